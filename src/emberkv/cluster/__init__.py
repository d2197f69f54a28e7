"""Many of them: which replica a request goes to. Pure decisions; nothing here knows a network."""
