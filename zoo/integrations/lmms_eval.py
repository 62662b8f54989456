"""The zoo's models in lmms-eval: ``python -m lmms_eval --model zoo --model_args checkpoint=RUN --tasks ...``.

lmms-eval (0.7, its ``models/registry_v2.py``) finds :func:`manifest` through the entry point ``lmms_eval.models`` and
then asks this module for the class ``Zoo``, which is made then: importing this module imports neither lmms-eval nor
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from zoo.errors import ConfigError

MAX_NEW_TOKENS = 64
"""Length of an answer where a task states none."""
GREEDY: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "temperature": (0, 0.0, None),
    "num_beams": (1, None),
}
"""Values of generation settings that mean greedy decoding, the only one here."""


def manifest() -> Any:
    """Return what the entry point hands to lmms-eval: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="zoo", simple_class_path=f"{__name__}.Zoo")


def __getattr__(name: str) -> Any:
    if name == "Zoo":
        return _class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _class() -> type:
    from lmms_eval.api.model import lmms

    return type("Zoo", (Adapter, lmms), {"__module__": __name__, "__doc__": Adapter.__doc__})


class Adapter:
    """A trained zoo model behind lmms-eval's requests.

    Args:
        checkpoint: a run directory, a checkpoint folder, or what else ``zoo.from_pretrained`` takes.
        recipe: the recipe that an official file belongs to.
        batch_size: requests a forward pass.
        device: where the model runs; None as ``zoo eval``.
        prompt: how a task's text is put to the model, with ``{question}`` for it.
        ignored: what lmms-eval passes to every model.

    Raises:
        ConfigError: no checkpoint, or values that make no sense.
        WeightsError: as ``zoo.from_pretrained``.
    """

    is_simple = True
    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(
        self,
        checkpoint: str = "",
        recipe: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        prompt: str = "{question}",
        **ignored: Any,
    ) -> None:
        super().__init__()
        if not checkpoint:
            raise ConfigError("which model? say --model_args checkpoint=RUN, a run directory or a checkpoint folder")
        if unknown := set(ignored) - {"max_batch_size"}:
            raise ConfigError(f"--model_args {min(unknown)}: expected checkpoint, recipe, prompt, batch_size or device")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size = {batch_size!r}: expected a number of at least 1")
        if "{question}" not in prompt:
            raise ConfigError(f"prompt = {prompt!r}: expected {{question}} in it")
        from zoo.cli.checkpoint import load

        self.batch_size = int(batch_size)
        self.prompt = prompt
        self.module = load(str(checkpoint), recipe or None)
        if device is not None:
            self.module.to(device)

    @property
    def device(self) -> Any:
        """The device of the model's weights; lmms-eval gathers its counts there."""
        return next(self.module.parameters()).device

    # -- requests ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Write a text for each request: (context, generation settings, document -> images, document, task, split).

        Greedy; cut at the first of the settings' ``until``.

        Raises:
            ConfigError: the model writes no text, a task wants sampling or beams, or another number of images than one.
        """
        write = self._capability("generate_text")
        longest = [self._longest(request.args[1]) for request in requests]
        out = [""] * len(requests)
        for limit in sorted(set(longest)):
            for part in self._parts([n for n, own in enumerate(longest) if own == limit]):
                prompts = [self._prompt(requests[n].args[0]) for n in part]
                images = [self._image(*requests[n].args[2:6]) for n in part]
                for n, text in zip(part, write(images, prompts, max_new_tokens=limit), strict=True):
                    context, settings = requests[n].args[:2]
                    out[n] = _cut(text, settings.get("until"))
                    self.cache_hook.add_partial("generate_until", (context, settings), out[n])
        return out

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Return (loss, whether it is what the model writes) for each request: (context, target, document -> images,
        document, task, split). Each pair is the ``text`` of a ``GenerationResult``: lmms-eval 0.7.3 writes any other
        answer that is no text as one (``unwrap_generation_output`` of its ``api/instance.py``), pairs too.

        The loss is -log p(target | image, context) in nats, summed over the target's tokens and its end: lmms-eval's
        multiple choice takes the least one (``np.argmin`` in its ``api/task.py``), unlike what its docstring says.

        Raises:
            ConfigError: the model scores no texts, a request without an image, or another number of images than one.
        """
        from lmms_eval.api.instance import GenerationResult

        score = self._capability("score_text")
        if any(len(request.args) < 6 for request in requests):
            raise ConfigError("lmms-eval's acc_mutual_info asks for texts without their image; leave that metric out")
        out: list[Any] = [None] * len(requests)
        for part in self._parts(range(len(requests))):
            arguments = [requests[n].args for n in part]
            images = [self._image(*own[2:6]) for own in arguments]
            prompts = [self._prompt(own[0]) for own in arguments]
            targets = [self._target(*own[1:6]).strip() for own in arguments]
            losses = -score(images, targets, prompts).double().cpu()
            written = self._greedy(images, prompts, targets)
            for n, loss, text, target in zip(part, losses.tolist(), written, targets, strict=True):
                out[n] = GenerationResult(text=(loss, text == target))
        return out

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused in one line: a request of several rounds is answered with what the rounds before brought."""
        del requests
        raise ConfigError("the zoo answers one question at a time: leave tasks of generate_until_multi_round out")

    # -- what they are made of -----------------------------------------------------------------------------------------

    def _capability(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] | None = getattr(self.module.model, name, None)
        if found is None:
            from zoo.capabilities import capabilities_of

            offers = ", ".join(capabilities_of(self.module.model)) or "nothing"
            raise ConfigError(f"{self.module.recipe.name} has no {name}, which this task needs; it offers {offers}")
        return found

    def _parts(self, places: Sequence[int]) -> Iterator[Sequence[int]]:
        for start in range(0, len(places), self.batch_size):
            yield places[start : start + self.batch_size]

    def _prompt(self, context: str) -> str:
        return self.prompt.replace("{question}", context)

    def _document(self, document: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][document]

    def _image(self, visuals: Callable[[Any], Any], document: int, task: str, split: str) -> Any:
        from PIL.Image import Image

        found = list(visuals(self._document(document, task, split)) or ())
        if len(found) != 1 or not isinstance(found[0], Image):
            what = f"{len(found)} images" if len(found) != 1 else f"a {type(found[0]).__name__}"
            raise ConfigError(f"{task}: document {document} shows {what}; the zoo's models answer about one image here")
        return found[0].convert("RGB")

    def _target(self, target: Any, visuals: Any, document: int, task: str, split: str) -> str:
        del visuals
        return target if isinstance(target, str) else str(target(self._document(document, task, split)))

    def _greedy(self, images: Sequence[Any], prompts: Sequence[str], targets: Sequence[str]) -> list[str]:
        """What the model writes instead of each target, as far as it can write."""
        write = getattr(self.module.model, "generate_text", None)
        if write is None:
            return [""] * len(targets)
        longest = min(MAX_NEW_TOKENS, max(len(target.encode()) for target in targets) + 1)  # a token is a byte or more
        return [text.strip() for text in write(images, prompts, max_new_tokens=max(1, longest))]

    def _longest(self, settings: Mapping[str, Any]) -> int:
        for key, values in GREEDY.items():
            if key in settings and settings[key] not in values:
                raise ConfigError(
                    f"the task sets {key}={settings[key]}, and the zoo decodes greedily here: leave it out"
                )
        return int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stops."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text.strip()
