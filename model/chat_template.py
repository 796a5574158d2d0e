"""Chat templates in Jinja: other tools then make the prompts that `dataset.template` makes."""

from dataset.template import TEMPLATES, encode_prompt

# Behind lines that set `default_system`, `image`, `begin` and `turns` (role -> what stands around a content).
BODY = """\
{%- if default_system and (not messages or messages[0].role != 'system') -%}
    {%- set messages = [{'role': 'system', 'content': default_system}] + messages -%}
{%- endif -%}
{{- begin -}}
{%- set waiting = namespace(text='') -%}
{%- for message in messages if message.role != 'system' or message.content -%}
    {%- if message.role not in ('system', 'user', 'assistant') -%}
        {{- raise_exception("role must be 'system', 'user' or 'assistant', got '" ~ message.role ~ "'") -}}
    {%- endif -%}
    {%- set pieces = namespace(text='') -%}
    {%- if message.content is string -%}
        {%- set pieces.text = message.content -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}
                {%- set pieces.text = pieces.text ~ part.text -%}
            {%- elif part.type == 'image' and image and message.role == 'user' -%}
                {%- set pieces.text = pieces.text ~ image -%}
            {%- else -%}
                {{- raise_exception("a " ~ message.role ~ " turn can't hold a part of type '" ~ part.type ~ "'") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.role not in turns -%}
        {%- set waiting.text = pieces.text ~ '\\n\\n' -%}
    {%- else -%}
        {%- set turn = turns[message.role] -%}
        {{- turn.header -}}
        {%- if message.role == 'user' -%}
            {{- waiting.text -}}
            {%- set waiting.text = '' -%}
        {%- endif -%}
        {{- pieces.text ~ turn.end ~ turn.tail -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- turns.assistant.header -}}{%- endif -%}
"""

# What `check_chat_template` compares: texts of several scripts, signs at both ends, line breaks within.
PROBES = [
    [{"role": "user", "content": "What colour is it?"}],
    [
        {"role": "system", "content": "Be brief.\nAnswer in English!"},
        {"role": "user", "content": "One two, 12345 it's\n\n(three)."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "红的吗"},
        {"role": "assistant", "content": "Yes, I am sure"},
        {"role": "user", "content": "Why?"},
    ],
]


def chat_template(name: str, system: str | None, image: str | None = None, begin: str = "", eos: str = "") -> str:
    """Jinja chat template that writes conversations as `encode_prompt` does.

    Args:
        name: key of `TEMPLATES`.
        system: text of the system turn of a conversation that brings none.
        image: what a part of type "image" becomes; None where a turn can't hold one.
        begin: token that every text begins with.
        eos: the tokenizer's end-of-sequence token.
    """
    turns = {
        role: {part: text.replace("{eos}", eos) for part, text in turn._asdict().items()}
        for role in ("system", "user", "assistant")
        if (turn := getattr(TEMPLATES[name], role)) is not None
    }
    values = {"default_system": system, "image": image, "begin": begin, "turns": turns}
    return "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in values.items()) + "\n" + BODY


def check_chat_template(exported, tokenizer) -> None:
    """Raises ValueError if a tokenizer of transformers makes other ids with its chat template than `encode_prompt`.

    Tools encode a prompt as one text, `encode_prompt` every content apart. These agree where no token joins the end of
    a header and the beginning of a content.

    Args:
        exported: has a `chat_template` without `default_system`.
        tokenizer: what `encode_prompt` takes.
    """
    for messages in PROBES:
        expected = encode_prompt(messages, tokenizer, 0)
        ids = exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if list(ids) != expected:
            first = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected) - 1)
            found, wanted = (exported.convert_ids_to_tokens(list(row[first : first + 3])) for row in (ids, expected))
            raise ValueError(
                f"no chat template makes the prompts of template {tokenizer.template!r} with this tokenizer, whose "
                f"tokens reach across turns and contents: the training has {wanted}, a prompt in one piece {found}; "
                "take a template whose turns begin and end with control tokens"
            )
