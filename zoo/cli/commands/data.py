"""zoo data: commands that make datasets and show them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("zoo data", description="Make datasets, and look at them.")
    commands = parser.add_subparsers(dest="command", required=True)
    capfilt = commands.add_parser(
        "capfilt",
        help="clean a dataset with the captioner and the filter of a BLIP",
        description="Fine-tune a captioner and a filter from a BLIP run on the trusted pairs of its data, caption every"
        " other training image, drop the texts that the filter rejects, and write what is left as a folder dataset.",
    )
    capfilt.add_argument("run", help="run directory of a BLIP, trained with data.trusted above 0")
    capfilt.add_argument("--out", required=True, help="new folder for the dataset")
    capfilt.add_argument("--steps", type=int, default=200, help="of fine-tuning captioner and filter each")
    capfilt.add_argument("--batch-size", type=int, default=64)
    capfilt.add_argument("--lr", type=float, default=0.0, help="peak of fine-tuning; 0 = a fifth of the run's")
    capfilt.add_argument("--top-p", type=float, default=0.9, help="nucleus the captioner samples from")
    capfilt.add_argument("--max-new-tokens", type=int, default=20)
    capfilt.add_argument("--seed", type=int, default=0)
    preview = commands.add_parser(
        "preview",
        help="write a sheet of samples with their texts as one PNG",
        description="Write samples of a dataset, with captions, questions and answers, as one picture to look at.",
    )
    preview.add_argument("data", metavar="NAME[,FIELD=VALUE...]", help="e.g. openmoji-scenes,objects=2..4")
    preview.add_argument("--split", default="train", help="train, val or test")
    preview.add_argument("--count", type=int, default=12, help="samples")
    preview.add_argument("--size", type=int, default=None, help="pixels, for data that is rendered")
    preview.add_argument("--out", default="preview.png", help="the PNG to write")
    pack = commands.add_parser(
        "pack",
        help="write any dataset as tar shards (WebDataset) with an index and checksums",
        description="Write a dataset as tar shards with an index and checksums, in parallel; stopped and started again,"
        " it writes what is missing. Train on them with data=shards data.root=OUT.",
    )
    pack.add_argument("data", metavar="NAME[,FIELD=VALUE...]", help="e.g. openmoji-scenes,objects=2..4")
    pack.add_argument("--out", required=True, help="folder of the shards")
    pack.add_argument("--splits", default="train,val,test", help="which splits, joined by commas")
    pack.add_argument("--samples", type=int, default=1000, help="of a shard, at most")
    pack.add_argument("--format", default="png", help="of images: png keeps every pixel, jpeg does not")
    pack.add_argument("--size", type=int, default=None, help="pixels, for data that is rendered")
    pack.add_argument("--workers", type=int, default=1, help="processes")
    arguments = parser.parse_args(argv)
    if arguments.command == "pack":
        return _pack(arguments)
    return _preview(arguments) if arguments.command == "preview" else _capfilt(arguments)


def _preview(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from zoo.cli.commands.eval import parse_data
    from zoo.data.preview import sheet
    from zoo.errors import ConfigError, RunError
    from zoo.plugin import catalogue

    if arguments.count < 1:
        raise ConfigError(f"--count {arguments.count}: expected at least 1")
    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: expected a file ending in .png in a folder that exists")
    values = parse_data(arguments.data)
    source = catalogue()["data"].parse(values.pop("name"), values, "data").build(arguments.size)
    ids = source.ids(arguments.split)
    page = sheet(source, ids[: arguments.count])
    try:
        page.save(out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from None
    print(f"{out}: {min(arguments.count, len(ids))} of {len(ids)} {arguments.split} samples of {source.name}")
    print(source.licence)
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress

    from zoo.cli.commands.eval import parse_data
    from zoo.data.pack import Packing, pack

    packing = Packing(
        data=parse_data(arguments.data),
        out=Path(arguments.out),
        samples=arguments.samples,
        splits=tuple(split for split in arguments.splits.split(",") if split),
        image_format=arguments.format,
        image_size=arguments.size,
        workers=arguments.workers,
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("shards", total=None)
        done = pack(packing, lambda now, total: progress.update(bar, completed=now, total=total))
    samples, size = (sum(shard[key] for shard in done["shards"]) for key in ("samples", "bytes"))
    print(f"{arguments.out}: {samples} samples in {len(done['shards'])} shards, {size / 1e6:.1f} MB")
    for line in done["skipped"]:
        print(f"left out: {line}")
    print(done["licence"])
    print(f"train on them: zoo train data=shards data.root={arguments.out} ...")
    return 0


def _capfilt(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from zoo.cli.checkpoint import load
    from zoo.data.capfilt import CAPTIONS, CapFilt, clean
    from zoo.errors import ConfigError
    from zoo.plugin import catalogue
    from zoo.run_config import RunConfig

    config = CapFilt(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        top_p=arguments.top_p,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    folder = Path(arguments.run)
    if not (folder / "run.yaml").is_file():
        raise ConfigError(f"{folder} is no run directory: train one with zoo train model=blip data.trusted=0.2 ...")
    run = RunConfig.read(folder / "run.yaml")
    values = {key: value for key, value in run.data.items() if key != "name"}
    module = load(str(folder))
    source = catalogue()["data"].parse(run.data["name"], values, "data").build(run.recipe.image_size)
    out = Path(arguments.out)
    summary = clean(module, source, out, config)
    for kind, counts in summary["captions"].items():
        print(f"{kind}: kept {counts['kept']} of {counts['judged']} captions")
    if "right_after" in summary:
        print(f"right captions: {summary['right_before']:.1%} before, {summary['right_after']:.1%} after")
    print(
        f"train on it: zoo train model={run.recipe.model} scale={run.recipe.scale} data=folder data.root={out}"
        f" data.captions={CAPTIONS} data.split_column=split"
    )
    return 0
