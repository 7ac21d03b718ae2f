"""The command line: ``vtok compress | bench | info | methods``. Bad input is one sentence on stderr and exit code 2."""

from __future__ import annotations

import inspect
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import PIL.Image  # noqa: F401  needed only later: a missing extra is said at once
import safetensors  # noqa: F401
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vtok import encoder, info, methods, trial, video
from vtok.draw import draw, kept_per_frame, preview, residuals, sheet, spread
from vtok.follow import CHUNK, Account, follow

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
out, err = Console(), Console(stderr=True)


class Problem(Exception):
    """One sentence for the user."""


def run(args: list[str]) -> int:
    try:
        return app(args or ["--help"], prog_name="vtok", standalone_mode=False) or 0
    except Problem as problem:
        sentence = str(problem)
    except Exception as error:  # typer's own usage errors; their class moves between its versions
        if not hasattr(error, "format_message"):
            raise
        sentence = error.format_message()
    print("vtok:", " ".join(sentence.split()), file=sys.stderr)
    return 2


@app.callback()
def _about() -> None:
    """Compress video tokens for video language models."""


@app.command()
def compress(
    source: Annotated[Path, typer.Argument(metavar="VIDEO", help="Any file FFmpeg reads.")],
    budget: Annotated[str | None, typer.Option(metavar="N", help="Rows to keep.")] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="SHARE", help="25% or 0.25; the default is 25%, or the method's own.")
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(metavar="X", help="Keep what the method scores above X, however many rows that is.")
    ] = None,
    method: Annotated[str, typer.Option(help="A name from `vtok methods`.")] = "evs",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the method, as its docstring says; may be repeated."),
    ] = None,
    fps: Annotated[str, typer.Option(metavar="N", help="Frames taken per second.")] = "2",
    size: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Longest side; larger frames are scaled down. 448, or the encoder's own."),
    ] = None,
    patch: Annotated[int | None, typer.Option(metavar="PX", help="Side of a patch: 16, or the encoder's own.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--encoder", metavar="MODEL", help="Folder or hub id of a SigLIP, CLIP or Qwen2.5-VL model."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the default is cuda if there is one.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The default is ./<VIDEO>-vtok.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help=f"In constant memory, {CHUNK} frames at a time, each with its own budget.")
    ] = False,
    save_tokens: Annotated[bool, typer.Option("--save-tokens", help="Also write tokens.safetensors.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
) -> None:
    """Compress the patches of a video, or an encoder's tokens of it; sheet.png and preview.mp4 show what was kept."""
    rate = _number(fps)
    if rate <= 0:
        raise Problem(f"expected --fps to be a number > 0, got {fps!r}")
    for name, value in (("--size", size), ("--patch", patch)):
        if value is not None and not 1 <= value <= video.MAX_SIDE:
            raise Problem(f"expected {name} in [1, {video.MAX_SIDE}], got {value}")
    if method not in methods.names():
        raise Problem(f"expected --method to be one of {', '.join(methods.names())}, got {method!r}")
    amount = _amount(budget, keep, threshold, methods.get(method).budget is not None) | _options(option or [], method)
    if model is not None and patch is not None:
        raise Problem("expected --patch or --encoder, whose patches have a size of their own, got both")
    if stream and (model is not None or save_tokens):
        raise Problem(f"expected --stream without {'--encoder' if model is not None else '--save-tokens'}, got both")
    where = _device(device)
    folder = folder or Path(f"{source.stem}-vtok")
    names = ["sheet.png", "preview.mp4", *(["tokens.safetensors"] if save_tokens else [])]
    if stream:
        with _staged(folder, names, force) as stage:
            account, seconds = trial.timed(
                lambda: _follow(stage, source, rate, size or 448, patch or 16, method, amount, where), where
            )
        out.print(_account_table(account, seconds, where), soft_wrap=True)
        out.print(Text(f"wrote {', '.join(str(folder / name) for name in names)}"), soft_wrap=True)
        return
    with _staged(folder, names, force) as stage:
        tower = None if model is None else _load(model, where)
        patch = patch or (tower.patch if tower else 16)
        size = size or (tower and tower.size) or 448
        clip, seconds = trial.timed(lambda: _decode(source, rate, size, patch), torch.device("cpu"))
        if clip.problem:
            print(f"vtok: {clip.problem}; going on with the frames before", file=sys.stderr)
        steps = [trial.Step("decode", seconds, clip.decoded * clip.width * clip.height * 3)]
        result = _compress(clip, patch, amount, method, where, tower, steps)
        title = f"{source.name}  ·  {method}" + (f" of {tower.family.title} tokens" if tower else "")
        _write(stage, clip, result, patch, method, title, save_tokens)
    out.print(_table(clip, result, where, tower), soft_wrap=True)
    out.print(Text(f"wrote {', '.join(str(folder / name) for name in names)}"), soft_wrap=True)


@app.command(name="methods")
def list_methods() -> None:
    """The compressors by name."""
    table = Table(box=None, show_header=False)
    for name in methods.names():
        told = methods.get(name).module.__doc__ or ""
        table.add_row(name, Text(told.strip().partition("\n")[0]))
    out.print(table, soft_wrap=True)


@app.command(name="info")
def show_info() -> None:
    """What runs here, for a bug report."""
    table = Table(box=None, show_header=False)
    for section, values in info.report().items():
        table.add_row(Text(section, "bold"))
        for name, value in values.items():
            table.add_row(Text(f"  {name}"), Text(value))
    out.print(table, soft_wrap=True)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure the ops on this machine; `vtok bench --help` says more."""
    from vtok.bench.report import main

    raise typer.Exit(main(context.args) or 0)


def _amount(budget: str | None, keep: str | None, threshold: str | None, own: bool) -> trial.Amount:
    """Rows, a share, or a threshold; nothing where the method has a budget of its own and no other is asked for."""
    given = {"--budget": budget, "--keep": keep, "--threshold": threshold}
    named = [name for name, text in given.items() if text is not None]
    if not named and own:
        return {}
    if len(named) > 1:
        raise Problem(f"expected one of --budget, --keep and --threshold, got {' and '.join(named)}")
    if threshold is not None:
        try:
            return {"threshold": _finite(threshold)}
        except ValueError as error:
            raise Problem(f"expected --threshold to be a number, got {threshold!r}") from error
    if budget is not None:
        rows = _number(budget)
        if rows < 1 or rows.denominator != 1:
            raise Problem(f"expected --budget to be a number of rows >= 1, got {budget!r}")
        return {"budget": int(rows)}
    keep = "25%" if keep is None else keep
    share = _number(keep.removesuffix("%")) / (100 if keep.endswith("%") else 1)
    if not 0 < share <= 1:
        raise Problem(f"expected --keep in (0%, 100%], such as 25% or 0.25, got {keep!r}")
    return {"budget": share}


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


SPELLED: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": _finite,
    "str": str,
    "bool": {"true": True, "false": False}.__getitem__,
}


def _options(texts: list[str], method: str) -> dict[str, Any]:
    """What NAME=VALUE spell, for those of the method's options that are a number, a word or true or false."""
    parameters = inspect.signature(methods.get(method).call).parameters
    kinds = {name: str(parameters[name].annotation).removesuffix(" | None") for name in methods.get(method).options}
    kinds = {name: kind for name, kind in sorted(kinds.items()) if kind in SPELLED}
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in options:
            raise Problem(f"expected --option NAME=VALUE, each name once, got {text!r}")
        if name not in kinds:
            raise Problem(f"expected an --option of {method!r} among ({', '.join(kinds) or 'none'}), got {name!r}")
        try:
            options[name] = SPELLED[kinds[name]](value)
        except (ValueError, KeyError) as error:
            raise Problem(f"expected --option {name} to be of type {kinds[name]}, got {value!r}") from error
    return options


def _number(text: str) -> Fraction:
    """The decimal a text spells; 0, which no option takes, where it spells none."""
    try:
        return Fraction(text) if math.isfinite(float(text)) else Fraction(0)
    except ValueError:
        return Fraction(0)


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # what an absent device raises depends on its kind
        reason = str(error).partition("\n")[0]
        raise Problem(f"expected a --device that this torch can use, got {name!r}: {reason}") from error
    return device


@contextmanager
def _progress(name: str) -> Iterator[Callable[[float, float | None], None]]:
    """A bar on a terminal; what it gives takes how much is done, and of how much."""
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _decode(source: Path, rate: Fraction, size: int, patch: int) -> video.Clip:
    with _progress("decode") as progress:
        try:
            return video.read(source, fps=rate, size=size, patch=patch, progress=progress)
        except (video.VideoError, OSError) as error:
            raise Problem(str(error)) from error


def _load(model: str, device: torch.device) -> encoder.Encoder:
    try:
        return encoder.load(model, device)
    except encoder.EncoderError as error:
        raise Problem(str(error)) from error


def _compress(
    clip: video.Clip,
    patch: int,
    amount: trial.Amount,
    method: str,
    device: torch.device,
    tower: encoder.Encoder | None,
    steps: list[trial.Step],
) -> trial.Trial:
    """The trial, its steps after ``steps`` and the encoder's."""
    try:
        if tower is None:
            result = trial.run(clip.frames, patch, amount, method, device)
        else:
            frames = trial.whole_tubelets(clip.frames, tower.tubelet)
            with _progress("encode") as progress:
                tokens, seconds = trial.timed(lambda: tower(frames, progress), device)
            steps = [*steps, trial.Step("encode", seconds)]
            result = trial.run(clip.frames, patch, amount, method, device, tokens=tokens, tubelet=tower.tubelet)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise Problem(str(error).partition("\n")[0] or type(error).__name__) from error
    result.steps[:0] = steps
    return result


def _write(
    stage: Path, clip: video.Clip, result: trial.Trial, patch: int, method: str, title: str, save_tokens: bool
) -> None:
    shown = draw(clip.frames, result.packed, patch=patch)
    counts = kept_per_frame(clip.frames, result.packed)
    cells = spread(len(counts))
    frame = result.tokens // result.packed.layout.grids[0][0]
    labels = [(f"{clip.times[i]:.2f} s", f"kept {counts[i]} of {frame}") for i in cells]
    facts = f"{len(counts)} frames  ·  {result.tokens:,} tokens in, {result.rows:,} rows out  ·  PSNR rebuilt: "
    facts += ", ".join(f"{name} {value:.1f} dB" for name, value in result.psnr.items())
    panels = {"original": clip.frames, "kept": shown, "rebuilt": result.rebuilt}
    if methods.get(method).kind == "gate":
        panels["residuals"] = residuals(clip.frames, result.rebuilt, result.packed, patch=patch)
    try:
        sheet(shown[cells], labels, title, facts).save(stage / "sheet.png", optimize=True)
        video.write(stage / "preview.mp4", preview(panels), clip.rate)
        if save_tokens:
            result.packed.save(stage / "tokens.safetensors")
    except (video.VideoError, OSError) as error:
        raise Problem(str(error)) from error


def _follow(
    stage: Path, source: Path, rate: Fraction, size: int, patch: int, method: str, amount: trial.Amount,
    device: torch.device,
) -> Account:  # fmt: skip
    """The whole file through a stream; the pictures are written as it goes by."""
    account = Account()
    try:
        with _progress("stream") as progress:
            pieces = follow(
                source, fps=rate, size=size, patch=patch, method=method, amount=amount, device=device,
                account=account, progress=progress,
            )  # fmt: skip
            pieces = chain([next(pieces)], pieces)  # the first one tells the rate
            pictures = (picture for piece in pieces for picture in preview(piece.panels))
            video.write(stage / "preview.mp4", pictures, account.rate)
        if account.problem:
            print(f"vtok: {account.problem}; went on with the frames before", file=sys.stderr)
        labels = [(f"{time:.2f} s", f"kept {kept} of {sites}") for time, kept, sites, _ in account.cells]
        facts = f"{account.frames} frames  ·  {account.tokens:,} tokens in, {account.rows:,} rows out  ·  "
        facts += f"PSNR rebuilt: {account.psnr:.1f} dB"
        cells = torch.stack([picture for *_, picture in account.cells])
        sheet(cells, labels, f"{source.name}  ·  {method}, streamed", facts).save(stage / "sheet.png", optimize=True)
    except (video.VideoError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise Problem(str(error).partition("\n")[0] or type(error).__name__) from error
    return account


def _account_table(account: Account, seconds: float, device: torch.device) -> Table:
    table = Table(box=None, show_header=False)
    table.add_row("frames", f"{account.frames} of {account.decoded}, from {account.size[0]}x{account.size[1]}")
    table.add_row("tokens in", f"{account.tokens:,}")
    table.add_row("rows out", f"{account.rows:,}")
    table.add_row("ratio", f"{account.rows / account.tokens:.1%}, {account.tokens / max(1, account.rows):.1f} to 1")
    table.add_row("decode to pictures", f"{seconds:.1f} s, {account.frames / seconds:.0f} frames a second on {device}")
    table.add_row("PSNR", f"{account.psnr:.2f} dB")
    return table


@contextmanager
def _staged(folder: Path, names: list[str], force: bool) -> Iterator[Path]:
    """A folder to write into; what it holds moves to ``folder`` once all of it is there, or not at all."""
    for target in (folder / name for name in names):
        if os.path.lexists(target) and (target.is_dir() or not force):
            remedy = "a directory" if target.is_dir() else "which exists; --force replaces it"
            raise Problem(f"expected to write {str(target)!r}, {remedy}")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".vtok-", dir=folder) as stage:
            yield Path(stage)
            for name in names:
                os.replace(Path(stage, name), folder / name)
    except OSError as error:
        raise Problem(f"expected a folder to write to, got {str(folder)!r}: {error.strerror}") from error
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _table(clip: video.Clip, result: trial.Trial, device: torch.device, tower: encoder.Encoder | None) -> Table:
    height, width = clip.frames.shape[1:3]
    table = Table(box=None, show_header=False)
    table.add_row("frames", f"{len(clip.times)} of {clip.decoded}, {width}x{height} of {clip.width}x{clip.height}")
    if tower:
        token = f"{tower.patch}x{tower.patch} pixels" + (f" of {tower.tubelet} frames" if tower.tubelet > 1 else "")
        table.add_row("encoder", Text(f"{tower.family.title}, {token} a token"))
        table.add_row("pictures, PSNR", "of the pixels where its tokens were kept")
    table.add_row("tokens in", f"{result.tokens:,} of {result.packed.values.shape[1]:,} numbers")
    table.add_row("rows out", f"{result.rows:,}")
    table.add_row("ratio", f"{result.rows / result.tokens:.1%}, {result.tokens / max(1, result.rows):.1f} to 1")
    for step in result.steps:
        table.add_row(step.name, str(step))
    table.add_row(f"backend, {device}", "\n".join(f"{op}: {by}" for op, by in result.backends.items()) or "torch")
    for name, value in result.psnr.items():
        table.add_row(f"PSNR, {name}", f"{value:.2f} dB")
    return table
