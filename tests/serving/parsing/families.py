"""Small chat templates of the shape that each family of models has, and an answer as each family writes it.

The templates are our own. A family's renders the assistant's turns exactly as its models write them, so that an answer
that is parsed and rendered again is the same text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import chat_template_utils

from emberkv.serving.parsing.events import ParsedCall, ParsedMessage
from emberkv.serving.parsing.formats import OutputFormat, parse_output

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"To {name} a file.",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "lines": {"type": ["array", "null"], "items": {"type": "integer"}},
                    "force": {"type": "boolean"},
                },
            },
        },
    }
    for name in ("read", "edit")
]

ARGUMENTS = {"path": 'a "b" <c>\n\\d é', "lines": [1, 20]}
CALLS = (
    ParsedCall("read", '{"path": "a \\"b\\" <c>\\n\\\\d é", "lines": [1, 20]}'),
    ParsedCall("edit", '{"force": true}'),
)


@dataclass(frozen=True, slots=True)
class Family:
    """A family's template, part by part.

    tools, reasoning: the formats that are to be found. turn, end: around an assistant's turn. thought: how the template
    writes one; keeps: "all" thoughts, or those since the last "user" message. call: how it writes a call, between
    calls_begin and calls_end. generation: what it puts behind ``turn`` where an answer begins. no_thought: what it
    writes in a turn since that message which has no thought; always_thought: not in the last turn only. ids: those of
    the calls, where the model writes them.
    """

    tools: str
    call: str
    turn: str = "<|im_start|>assistant\n"
    end: str = "<|im_end|>\n"
    reasoning: str | None = None
    thought: str = ""
    keeps: str = "user"
    no_thought: str = ""
    always_thought: bool = True
    content: str = "{{ message.content or '' }}"
    calls_begin: str = ""
    calls_end: str = ""
    generation: str = ""
    ids: tuple[str | None, ...] = (None, None)
    tools_late: bool = False
    says_with_call: bool = True

    @property
    def template(self) -> str:
        is_kept = "" if self.keeps == "all" else " and loop.index0 > ns.last"
        thought = f"{{%- if message.reasoning_content{is_kept} %}}{self.thought}{{% endif %}}" if self.thought else ""
        if self.no_thought:
            when = f"loop.index0 > ns.last and (loop.last or {str(self.always_thought).lower()})"
            thought = thought.replace("{% endif %}", f"{{% elif {when} %}}{self.no_thought}{{% endif %}}")
        tools = "<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n"
        text = (
            "{%- set ns = namespace(last=-1) %}{%- for message in messages %}"
            "{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
            + ("" if self.tools_late else tools) + "{%- for message in messages %}"
            + ("{%- if loop.index0 == ns.last %}" + tools + "{% endif %}" if self.tools_late else "")
            + "{%- if message.role == 'assistant' %}"
            + self.turn + thought + self.content
            + "{%- if message.tool_calls %}" + self.calls_begin + "{%- for tool_call in message.tool_calls %}"
            + "{%- set call = tool_call.function %}" + self.call + "{% endfor %}" + self.calls_end + "{% endif %}"
            + self.end + "{%- else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}"
            "{% endfor %}{%- if add_generation_prompt %}" + self.turn + self.generation + "{% endif %}"
        )  # fmt: skip
        return text.replace("\n", "{{ '\\n' }}")

    def message(self) -> ParsedMessage:
        """A thought, a text and two calls, as far as the family writes these."""
        return ParsedMessage(
            "First this.\n\nThen that." if self.reasoning else "",
            "Let me look." if self.says_with_call else "",
            tuple(
                ParsedCall(call.name, call.arguments, call_id) for call, call_id in zip(CALLS, self.ids, strict=True)
            ),
        )

    @property
    def format(self) -> OutputFormat:
        return OutputFormat(self.tools, self.reasoning)

    def parsed(self, answer: str) -> ParsedMessage:
        """What the family's parser makes of an answer to the template's prompt."""
        prompt = render(self.template, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        return parse_output(self.format, answer, tools=TOOLS, in_reasoning=self.format.ends_in_reasoning(prompt))

    def answer(self) -> str:
        """The message as the family's models write it."""
        return self.turn_text(self.message())

    def turn_text(self, message: ParsedMessage) -> str:
        """What the template renders for a message, without what the prompt and the end of the turn are."""
        history = [{"role": "user", "content": "Hello"}]
        whole = render(self.template, [*history, as_template_message(message)])
        prompt = render(self.template, history, add_generation_prompt=True)
        assert whole.startswith(prompt)
        return whole.removeprefix(prompt).removesuffix(self.end)


def render(template: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    rendered, _ = chat_template_utils.render_jinja_template(
        [list(messages)], chat_template=template, tools=TOOLS, **options
    )
    return str(rendered[0])


def as_template_message(message: ParsedMessage) -> dict[str, Any]:
    """In the form that chat templates take."""
    calls = [
        {
            "id": call.call_id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.loads(call.arguments)},
        }
        for call in message.calls
    ]
    return {
        "role": "assistant",
        "content": message.content,
        **({"reasoning_content": message.reasoning} if message.reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


_ARGUMENTS = "{{ call.arguments | tojson }}"
_THINK = "<think>\n{{ message.reasoning_content.strip('\\n') }}\n</think>\n\n"
_JSON_CALL = '{"name": "{{ call.name }}", "arguments": ' + _ARGUMENTS + "}"
_HERMES_CALL = (
    "{%- if not loop.first or message.content %}{{ '\\n' }}{% endif %}<tool_call>\n" + _JSON_CALL + "\n</tool_call>"
)
_TEXT_VALUE = "{{ value if value is string else value | tojson }}"
_LIST = "{%- if not loop.first %}, {% endif %}"
_QWEN_CALL = (
    "{%- if not loop.first or message.content %}{{ '\\n' }}{% endif %}<tool_call>\n<function={{ call.name }}>\n"
    "{%- for key, value in call.arguments.items() %}<parameter={{ key }}>\n"
    + _TEXT_VALUE
    + "\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>"
)
_GLM_CALL = (
    "\n<tool_call>{{ call.name }}\n{%- for key, value in call.arguments.items() %}"
    "\n<arg_key>{{ key }}</arg_key>\n<arg_value>" + _TEXT_VALUE + "</arg_value>{% endfor %}\n</tool_call>"
)
_INVOKE = (
    '<invoke name="{{ call.name }}">{%- for key, value in call.arguments.items() %}'
    '\n<parameter name="{{ key }}">' + _TEXT_VALUE + "</parameter>{% endfor %}\n</invoke>\n"
)
_DSML = (
    '<｜DSML｜invoke name="{{ call.name }}">\n{%- for key, value in call.arguments.items() %}'
    '\n<｜DSML｜parameter name="{{ key }}" string="{{ "true" if value is string else "false" }}">'
    + _TEXT_VALUE
    + "</｜DSML｜parameter>{% endfor %}\n</｜DSML｜invoke>\n"
)
_PYTHON_CALL = (
    _LIST
    + "{{ call.name }}({%- for key, value in call.arguments.items() %}"
    + _LIST
    + "{{ key }}={{ value | tojson if value is string else value }}{% endfor %})"
)


def _gemma_call(begin: str, end: str, quote: str) -> str:
    return (
        begin
        + "call:{{ call.name }}{ {%- for key, value in call.arguments.items() %}"
        + "{%- if not loop.first %},{% endif %}{{ key }}:"
        "{% if value is string %}"
        + quote
        + "{{ value }}"
        + quote
        + "{% else %}{{ value | tojson }}{% endif %}{% endfor %}}"
        + end
    )


FAMILIES: Mapping[str, Family] = {
    "Qwen2.5": Family("hermes", _HERMES_CALL),
    "Qwen3": Family(
        "hermes", _HERMES_CALL, reasoning="think", thought=_THINK,
        no_thought="<think>\n\n</think>\n\n", always_thought=False,
    ),
    "Qwen3-Coder": Family("qwen-xml", _QWEN_CALL),
    "Qwen3.5": Family(
        "qwen-xml", _QWEN_CALL, reasoning="think", thought=_THINK, turn="<|im_start|>assistant\n",
        generation="<think>\n", no_thought="<think>\n\n</think>\n\n",
    ),
    "GLM-4.5": Family(
        "glm", _GLM_CALL, reasoning="think", thought="<think>{{ message.reasoning_content }}</think>\n",
        turn="<|assistant|>\n", end="",
    ),
    "Llama-3": Family(
        "llama3-json", '{"name": "{{ call.name }}", "parameters": ' + _ARGUMENTS + '}{{ "; " if not loop.last }}',
        turn="<|start_header_id|>ipython<|end_header_id|>\n\n", end="<|eot_id|>", says_with_call=False,
    ),
    "Llama-4": Family(
        "pythonic", _PYTHON_CALL, calls_begin="<|python_start|>[", calls_end="]<|python_end|>", end="<|eot|>",
    ),
    "Mistral-Nemo": Family(
        "mistral",
        _LIST + '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}, "id": "{{ tool_call.id }}"}',
        calls_begin="[TOOL_CALLS][", calls_end="]", turn="", end="</s>", ids=("abcdefgh1", "abcdefgh2"),
        tools_late=True,
    ),
    "Magistral": Family(
        "mistral", "[TOOL_CALLS]{{ call.name }}[CALL_ID]{{ tool_call.id }}[ARGS]{{ call.arguments | tojson }}",
        reasoning="mistral", thought="[THINK]{{ message.reasoning_content }}[/THINK]", keeps="all",
        turn="", end="</s>", ids=("abcdefgh1", "abcdefgh2"),
    ),
    "DeepSeek-R1": Family(
        "deepseek",
        "{{ '\\n' if not loop.first }}<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ call.name }}\n```json\n"
        + _ARGUMENTS + "\n```<｜tool▁call▁end｜>",
        calls_begin="<｜tool▁calls▁begin｜>", calls_end="<｜tool▁calls▁end｜>",
        turn="<｜Assistant｜>", end="<｜end▁of▁sentence｜>", reasoning="think", thought=_THINK,
    ),
    "DeepSeek-V3.1": Family(
        "deepseek", "<｜tool▁call▁begin｜>{{ call.name }}<｜tool▁sep｜>" + _ARGUMENTS + "<｜tool▁call▁end｜>",
        calls_begin="<｜tool▁calls▁begin｜>", calls_end="<｜tool▁calls▁end｜>",
        turn="<｜Assistant｜>", end="<｜end▁of▁sentence｜>",
    ),
    "DeepSeek-V3.2": Family(
        "deepseek-dsml", _DSML, calls_begin="\n\n<｜DSML｜function_calls>\n", calls_end="</｜DSML｜function_calls>",
        turn="<｜Assistant｜>", end="<｜end▁of▁sentence｜>",
    ),
    "Kimi-K2": Family(
        "kimi", "<|tool_call_begin|>{{ tool_call.id }}<|tool_call_argument_begin|>" + _ARGUMENTS + "<|tool_call_end|>",
        calls_begin="<|tool_calls_section_begin|>", calls_end="<|tool_calls_section_end|>",
        ids=("functions.read:0", "functions.edit:1"),
    ),
    "MiniMax-M1": Family(
        "minimax-m1", _JSON_CALL + "\n", calls_begin="\n<tool_calls>\n", calls_end="</tool_calls>",
    ),
    "MiniMax-M2": Family(
        "minimax-m2", _INVOKE, calls_begin="\n<minimax:tool_call>\n", calls_end="</minimax:tool_call>",
        reasoning="think", thought=_THINK,
    ),
    "Gemma-4": Family(
        "gemma", _gemma_call("<|tool_call>", "<tool_call|>", '<|"|>'),
        reasoning="gemma", thought="<|channel>thought\n{{ message.reasoning_content }}\n<channel|>",
        turn="<|turn>model\n", end="<turn|>\n",
    ),
    "FunctionGemma": Family(
        "functiongemma", _gemma_call("<start_function_call>", "<end_function_call>", "<escape>"),
        turn="<start_of_turn>model\n", end="<end_of_turn>\n",
    ),
    "Gemma-3": Family(
        "gemma-python",
        _PYTHON_CALL.replace(_LIST + "{{ call.name", "{{ '\\n' if not loop.first }}{{ call.name"),
        calls_begin="```tool_code\n", calls_end="\n```", turn="<start_of_turn>model\n", end="<end_of_turn>\n",
    ),
    "gpt-oss": Family(
        "harmony",
        "{%- if not loop.first %}<|call|><|start|>assistant{% endif %}<|channel|>commentary to=functions."
        "{{ call.name }} <|constrain|>json<|message|>" + _ARGUMENTS,
        reasoning="harmony",
        thought="<|channel|>analysis<|message|>{{ message.reasoning_content }}<|end|><|start|>assistant",
        content="{%- if message.content %}<|channel|>{{ 'commentary' if message.tool_calls else 'final' }}<|message|>"
        "{{ message.content }}{% if message.tool_calls %}<|end|><|start|>assistant{% endif %}{% endif %}",
        turn="<|start|>assistant", end="<|call|>",
    ),
    "Phi-4-mini": Family(
        "phi4-mini", _LIST + _JSON_CALL, calls_begin="<|tool_call|>[", calls_end="]<|/tool_call|>",
        turn="<|assistant|>", end="<|end|>",
    ),
    "Granite-3": Family(
        "granite", _LIST + _JSON_CALL, calls_begin="<|tool_call|>[", calls_end="]",
        turn="<|start_of_role|>assistant<|end_of_role|>", end="<|end_of_text|>\n",
    ),
    "Command-A": Family(
        "cohere",
        "{%- if not loop.first %},{% endif %}\n    "
        '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ call.name }}", "parameters": ' + _ARGUMENTS + "}",
        calls_begin="<|START_ACTION|>[", calls_end="\n]<|END_ACTION|>", says_with_call=False,
        reasoning="cohere", thought="<|START_THINKING|>{{ message.reasoning_content }}<|END_THINKING|>",
        turn="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", end="<|END_OF_TURN_TOKEN|>",
    ),
    "Nemotron-Nano-2": Family(
        "nemotron", _LIST + _JSON_CALL, calls_begin="<TOOLCALL>[", calls_end="]</TOOLCALL>",
        reasoning="think", thought=_THINK, turn="<SPECIAL_11>Assistant\n", end="<SPECIAL_12>",
    ),
    "LFM2": Family(
        "lfm2", _PYTHON_CALL, calls_begin="<|tool_call_start|>[", calls_end="]<|tool_call_end|>",
    ),
    "Functionary-v3.1": Family(
        "function-tag", "<function={{ call.name }}>" + _ARGUMENTS + "</function>",
        turn="<|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eom_id|>",
    ),
    "Granite-3.2": Family(
        "granite", _LIST + _JSON_CALL, calls_begin="<|tool_call|>[", calls_end="]",
        reasoning="granite",
        thought="Here is my thought process:\n{{ message.reasoning_content }}\n\nHere is my response:\n",
        turn="<|start_of_role|>assistant<|end_of_role|>", end="<|end_of_text|>\n",
    ),
}  # fmt: skip
