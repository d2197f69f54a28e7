"""What is asked of a coding agent while it is recorded, what the model answers, and how each agent is set up."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from tests.agents.server import MODEL

TASK = "Change the greeting in greeting.txt from hello to goodbye."
FOLLOW_UP = "Say in one sentence what you have changed."
SAID_LAST = "The greeting in greeting.txt is goodbye now; it was hello before."
SIDE_ANSWER = "Greeting changed"
PROJECT = Path("/tmp/agent-project")  # noqa: S108 - agents write it into their prompts: it is the same everywhere
FILE = "hello from the harbor\nsecond line, which stays\n"


def call(name: str, **arguments: Any) -> str:
    """As Qwen3 writes a tool call."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


@dataclass(frozen=True)
class Agent:
    """How one agent is used.

    tool: of its main requests alone, which are known by that; None for an agent that has no tools and takes edits from
    the text: its second prompt has the changed file in it, and does not go on with the first. setup: arguments of a
    command before the others. steps: the model's answers to the
    task, each with the number of tool calls in it. first, second: arguments that ask TASK and, in the same session,
    FOLLOW_UP. ``{url}`` and ``{home}`` are filled in, in variables as well. files: what else it needs, by its path
    below the home.
    """

    name: str
    tool: str | None
    steps: Sequence[tuple[str, int]]
    first: Sequence[str]
    second: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    setup: Sequence[str] = ()
    project: Path = PROJECT

    def at(self, project: Path) -> Self:
        """The same agent in another folder, which the calls in the answers name, too."""
        steps = [(text.replace(str(self.project), str(project)), calls) for text, calls in self.steps]
        return replace(self, project=project, steps=steps)

    def prepare(self, url: str, home: Path) -> None:
        (self.project / "greeting.txt").write_text(FILE)
        for name, text in self.files.items():
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("{url}", url).replace("{home}", str(home)))

    @property
    def own_texts(self) -> list[str]:
        """Texts of ours in the agent's requests."""
        texts = [TASK, FOLLOW_UP, SAID_LAST, SIDE_ANSWER, *FILE.splitlines(), FILE.replace("hello", "goodbye")]
        texts += ["goodbye from the harbor", "greeting.txt", str(PROJECT)]
        return texts + THOUGHTS + SAYINGS


THOUGHTS = ["I read the file first.", "Two commands show the rest.", "Now the edit.", "It is done."]
SAYINGS = ["Let me look at the file.", "The file is changed."]


class Scenario:
    """The script of a recording; it says which exchange goes on with the session."""

    def __init__(self, agent: Agent) -> None:
        self.answer: str | None = None
        self.follows = False
        self._agent = agent

    def begin_request(self) -> None:
        self.answer, self.follows = None, False

    def say(self, prompt: str) -> str:
        """The answer to a prompt of `tests.agents.server`."""
        tool = self._agent.tool
        self.follows = FOLLOW_UP not in prompt if tool is None else f'"name": "{tool}"' in prompt
        self.answer = self._next(prompt) if self.follows else SIDE_ANSWER
        return self.answer

    def _next(self, prompt: str) -> str:
        if FOLLOW_UP in prompt:
            return thought("It is done.") + SAID_LAST
        results = prompt.rpartition(TASK)[2].count("<|im_start|>tool\n")
        before = 0
        for text, calls in self._agent.steps:
            if before == results:
                return text
            before += calls
        return SAYINGS[-1]


def _steps(look: str, commands: Sequence[str], edit: str) -> Sequence[tuple[str, int]]:
    """Reads, then runs two commands at once, then edits, then says that it is done."""
    return (
        (thought(THOUGHTS[0]) + SAYINGS[0] + "\n" + look, 1),
        (thought(THOUGHTS[1]) + "\n".join(commands), len(commands)),
        (thought(THOUGHTS[2]) + edit, 1),
        (thought(THOUGHTS[3]) + SAYINGS[1], 0),
    )


_TARGET = str(PROJECT / "greeting.txt")

CLAUDE = Agent(
    "claude-code",
    "Read",
    _steps(
        call("Read", file_path=_TARGET),
        [
            call("Bash", command="wc -l greeting.txt", description="Count the lines"),
            call("Bash", command="cat greeting.txt", description="Show the file"),
        ],
        call("Edit", file_path=_TARGET, old_string="hello", new_string="goodbye"),
    ),
    ("-p", TASK, "--allowedTools", "Bash,Read,Edit"),
    ("--continue", "-p", FOLLOW_UP),
    {
        "ANTHROPIC_BASE_URL": "{url}",
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "131072",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "8192",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    },
)

CODEX = Agent(
    "codex",
    "exec_command",
    _steps(
        call("exec_command", cmd="cat greeting.txt"),
        [call("exec_command", cmd="wc -l greeting.txt"), call("exec_command", cmd="cat greeting.txt")],
        call("exec_command", cmd="sed -i s/hello/goodbye/ greeting.txt"),
    ),
    ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", TASK),
    ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "resume", "--last", FOLLOW_UP),
    files={
        ".codex/config.toml": f"""\
model = "{MODEL}"
model_provider = "emberkv"
model_context_window = 131072

[model_providers.emberkv]
name = "emberkv"
base_url = "{{url}}/v1"
wire_api = "responses"
"""
    },
)

QWEN = Agent(
    "qwen-code",
    "agent",
    _steps(
        call("read_file", file_path=_TARGET),
        [
            call("run_shell_command", command="wc -l greeting.txt", description="Count the lines", is_background=False),
            call("run_shell_command", command="cat greeting.txt", description="Show the file", is_background=False),
        ],
        call("edit", file_path=_TARGET, old_string="hello", new_string="goodbye"),
    ),
    ("--auth-type", "openai", "--yolo", "-p", TASK),
    ("--auth-type", "openai", "--yolo", "--continue", "-p", FOLLOW_UP),
    {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": MODEL},
)

OPENCODE = Agent(
    "opencode",
    "read",
    _steps(
        call("read", filePath=_TARGET),
        [
            call("bash", command="wc -l greeting.txt", description="Count the lines"),
            call("bash", command="cat greeting.txt", description="Show the file"),
        ],
        call("edit", filePath=_TARGET, oldString="hello", newString="goodbye"),
    ),
    ("run", TASK),
    ("run", "--continue", FOLLOW_UP),
    {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"},
    {
        ".config/opencode/opencode.json": json.dumps(
            {
                "model": f"emberkv/{MODEL}",
                "small_model": f"emberkv/{MODEL}",
                "provider": {
                    "emberkv": {
                        "npm": "@ai-sdk/openai-compatible",
                        "name": "emberkv",
                        "options": {"baseURL": "{url}/v1", "apiKey": "none"},
                        "models": {MODEL: {"name": MODEL, "limit": {"context": 131072, "output": 8192}}},
                    }
                },
            }
        )
    },
)

CLINE = Agent(
    "cline",
    "read_files",
    _steps(
        call("read_files", files=[{"path": _TARGET}]),
        [call("run_commands", commands=["wc -l greeting.txt"]), call("run_commands", commands=["cat greeting.txt"])],
        call("editor", path=_TARGET, old_text="hello", new_text="goodbye"),
    ),
    (TASK,),
    (),
    setup=("auth", "-p", "openai-compatible", "-k", "none", "-m", MODEL, "-b", "{url}/v1"),
)

_EDIT = f"""{SAYINGS[1]}

greeting.txt
```
<<<<<<< SEARCH
hello from the harbor
=======
goodbye from the harbor
>>>>>>> REPLACE
```
"""
_AIDER = (
    *("--model", f"openai/{MODEL}", "--openai-api-base", "{url}/v1", "--openai-api-key", "none"),
    *("--edit-format", "diff", "--yes-always", "--no-git", "--no-check-update", "--no-show-model-warnings"),
    *("--analytics-disable", "--no-gitignore", "--no-detect-urls"),
)

AIDER = Agent(
    "aider",
    None,
    ((thought(THOUGHTS[2]) + _EDIT, 0),),
    (*_AIDER, "--message", TASK, "greeting.txt"),
    (*_AIDER, "--restore-chat-history", "--message", FOLLOW_UP, "greeting.txt"),
)

AGENTS = {
    "claude": CLAUDE,
    "codex": CODEX,
    "qwen": QWEN,
    "opencode": OPENCODE,
    "cline": CLINE,
    "aider": AIDER,
}
