"""Templates as Jinja, in which runtimes keep a model's chat template."""

from __future__ import annotations

import json
import re

from rwkv_miss.data.templates import Template

_TAGS = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
_NO_THOUGHT = "enable_thinking is defined and enable_thinking == false"


def as_jinja(template: Template) -> str | None:
    """A template in Jinja that writes what `chat_prompt` and `render` write of a conversation: `messages` of roles
    system, user, assistant and tool, as far as the template has these, and the prompt of an answer if
    `add_generation_prompt`. With `enable_thinking` false the prompt is the one of an answer without a thought. Earlier
    answers are written without their thoughts, and stripped: what a runtime gives back begins with the space that the
    model writes. None for a template without a form for a question.

    It uses only what runtimes' own interpreters of Jinja have too: no macro, no filter's default arguments.
    """
    if template.jinja is not None:
        return _TAGS.sub("", template.jinja)
    if template.user is None:
        return None
    asked = "message.content"
    if template.cleans:  # without empty lines, which is what is left when runs of line breaks are joined
        asked = r"(message.content | trim).replace('\r\n', '\n').split('\n') | reject('equalto', '') | join('\n')"
    ends = template.question_end if template.think_prompt else ""
    lines = []
    if ends:
        lines += [
            "{%- set last = namespace(user=-1) -%}",
            "{%- for message in messages -%}",
            "{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}",
            "{%- endfor -%}",
        ]
    lines.append("{%- for message in messages -%}")
    word = "if"
    for role in ("system", "user", "tool"):
        if (string := getattr(template, role)) is None:
            continue
        before, after = (json.dumps(part, ensure_ascii=False) for part in string.split("{content}", 1))
        lines += [f"{{%- {word} message.role == '{role}' -%}}", f"{{{{- {before} -}}}}{{{{- {asked} -}}}}"]
        if role == "user" and ends:
            lines.append(
                f"{{%- if loop.index0 == last.user and add_generation_prompt and not ({_NO_THOUGHT}) -%}}"
                f"{{{{- {json.dumps(ends)} -}}}}{{%- endif -%}}"
            )
        lines.append(f"{{{{- {after} -}}}}")
        word = "elif"
    said = "message.content | trim" if template.keeps_thoughts else "message.content.split('</think>')[-1] | trim"
    before, after = template.answer.split("{content}", 1)
    lines += [
        "{%- elif message.role == 'assistant' -%}",
        f"{{{{- {json.dumps(template.prompt + before, ensure_ascii=False)} -}}}}{{{{- {said} -}}}}"
        f"{{{{- {json.dumps(after + template.end, ensure_ascii=False)} -}}}}",
        "{%- else -%}",
        "{{- raise_exception('no form for a turn of role ' + message.role) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
    ]
    plain = json.dumps(template.no_think_prompt or template.prompt, ensure_ascii=False)
    if template.think_prompt:
        thinks = json.dumps(template.think_prompt, ensure_ascii=False)
        lines += [
            f"{{%- if {_NO_THOUGHT} -%}}",
            f"{{{{- {plain} -}}}}",
            f"{{%- else -%}}{{{{- {thinks} -}}}}{{%- endif -%}}",
        ]
    else:
        lines.append(f"{{{{- {plain} -}}}}")
    return "\n".join([*lines, "{%- endif -%}"])
