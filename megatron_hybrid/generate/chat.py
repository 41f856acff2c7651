"""A chat as one prompt, written by the model's own template.

Templates are Jinja in Hugging Face's dialect: rendered in a sandbox, with blocks trimmed, ``messages`` and the names of special tokens
given, and ``raise_exception`` for what a template cannot write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from megatron_hybrid.data.tokenizer import HuggingFaceTokenizer
from megatron_hybrid.generate.load import LanguageModel


class ChatWriter:
    """Writes chats for a model.

    Raises:
        ValueError: the model has no chat template, or one that cannot be used; the message says what there is to do.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        # Only now: the rest of generation does without.
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        companions, tokenizer = language_model.companions, language_model.tokenizer
        if companions.chat_template is None:
            raise ValueError("this model has no chat template (chat_template.jinja beside its tokenizer); use /v1/completions")
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise ValueError(
                "chat templates need a tokenizer.json, and this model's tokenizer is a sentencepiece .model; use /v1/completions"
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(companions.chat_template)
        except TemplateSyntaxError as error:
            raise ValueError(f"this model's chat template cannot be read: {error}") from error
        self._template_error = TemplateError
        self._special_tokens, self._tokenizer = dict(companions.special_tokens), tokenizer

    def write(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """A chat as one text, control tokens written out.

        Args:
            messages: each with a role and a content.
            add_generation_prompt: end with what the assistant's next message begins with.

        Raises:
            ValueError: the template refuses the messages.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens)
        except (self._template_error, TypeError) as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error

    def encode_text(self, text: str) -> list[int]:
        """The tokens of what ``write`` returned."""
        return self._tokenizer.encode_markup(text)

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a chat whose next message is the assistant's.

        Raises:
            ValueError: the template refuses the messages, or writes nothing.
        """
        tokens = self.encode_text(self.write(messages, add_generation_prompt=True))
        if not tokens:
            raise ValueError("the model's chat template wrote nothing for these messages")
        return tokens


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
