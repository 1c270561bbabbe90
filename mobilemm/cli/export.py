"""`mobilemm export`: a checkpoint in, a verified bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from rich.console import Console

    from mobilemm.export.assemble import Result
    from mobilemm.export.plan_sizes import Estimate

# Headings of the help.
QUANTIZATION, ONNX, COREML, EXECUTORCH = "Quantization", "ONNX", "Core ML", "ExecuTorch"
SWIFT_NAMES = "swift-transformers"
QUANTIZED = "int4, int6, int8, pal4, pal6 (palettes: Core ML), fp16 or fp32"


def export(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder or hub id; left out, the model that ships with mobilemm."),
    ] = None,
    target: Annotated[
        list[str],
        typer.Option("--target", "-t", help="onnx, coreml or executorch; may be given more than once."),
    ] = ["onnx"],  # noqa: B006 (typer's own form)
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the bundle goes; left out, NAME-TARGET here.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace a bundle that is there already.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(rich_help_panel=QUANTIZATION, help="One precision for all parts: fp32, int8 or int4."),
    ] = None,
    q_llm: Annotated[
        str | None,
        typer.Option(
            "--q-llm", rich_help_panel=QUANTIZATION, help=f"Language model: {QUANTIZED} (int4 unless said)."
        ),
    ] = None,
    q_embed: Annotated[
        str | None, typer.Option("--q-embed", rich_help_panel=QUANTIZATION, help="Embedding table, likewise.")
    ] = None,
    q_vision: Annotated[
        str | None,
        typer.Option(
            "--q-vision",
            rich_help_panel=QUANTIZATION,
            help="Vision encoder and projector, likewise (int8 unless said), or w8a8 for Core ML.",
        ),
    ] = None,
    q_generator: Annotated[
        str | None,
        typer.Option(
            "--q-generator",
            rich_help_panel=QUANTIZATION,
            help="What draws, convolutions too: int8 unless said; fp32, fp16, int4, or of coreml pal4, pal6.",
        ),
    ] = None,
    q_method: Annotated[
        str | None,
        typer.Option(
            "--q-method",
            rich_help_panel=QUANTIZATION,
            help="gptq or awq (with data), hqq or rtn (without); gptq below 8 bits unless said.",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            rich_help_panel=QUANTIZATION,
            help="Weights that share a scale, or rows that share a palette: 16 to 256.",
        ),
    ] = None,
    asymmetric: Annotated[
        bool,
        typer.Option("--asymmetric", rich_help_panel=QUANTIZATION, help="With a zero point for each block."),
    ] = False,
    q_keep: Annotated[
        list[str] | None,
        typer.Option(
            "--q-keep",
            rich_help_panel=QUANTIZATION,
            help='Decoder layers stored otherwise: "layers.0.*=8", "*.down=pal6".',
        ),
    ] = None,
    q_search: Annotated[
        float | None,
        typer.Option(
            "--q-search",
            metavar="MB",
            rich_help_panel=QUANTIZATION,
            help="Spend this much on the language model: layers that suffer most get 8 bits, as measured.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=QUANTIZATION,
            help='JSON, a list of {"files": […], "messages": […]}; left out, the set that ships.',
        ),
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            "--max-seq-len",
            min=16,
            help="Longest conversation in tokens; left out, 8192 for onnx, 2048 for the others.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=50, help="Of the generator; left out, those that it was distilled for."),
    ] = None,
    stepwise: Annotated[
        bool,
        typer.Option(
            "--stepwise",
            help="The generator step by step: drawings are shown as they come, and made in 1, 2 or 4 steps.",
        ),
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(min=28, help="Side of the pictures, for families that leave it open.")
    ] = None,
    opset: Annotated[int, typer.Option(rich_help_panel=ONNX, help="Of decoder and embedding.")] = 21,
    kv_cache: Annotated[
        str,
        typer.Option(
            "--kv-cache",
            rich_help_panel=QUANTIZATION,
            help="Keys and values: float32, or int8, a quarter of the memory (onnx, executorch).",
        ),
    ] = "float32",
    standard_ops: Annotated[
        bool,
        typer.Option("--standard-ops", rich_help_panel=ONNX, help="Without onnxruntime's own operators."),
    ] = False,
    accuracy_level: Annotated[
        int,
        typer.Option(rich_help_panel=ONNX, help="Of MatMulNBits: 4 has activations in int8, 1 in float32."),
    ] = 4,
    ort_format: Annotated[
        bool,
        typer.Option(
            "--ort-format",
            rich_help_panel=ONNX,
            help="Also write .ort files, for onnxruntime's minimal builds.",
        ),
    ] = False,
    minimum_deployment_target: Annotated[
        str,
        typer.Option(
            rich_help_panel=COREML, help="iOS18 or iOS26, and macOS and the others of the same year."
        ),
    ] = "iOS18",
    coreml_layout: Annotated[
        str, typer.Option(rich_help_panel=COREML, help="gpu, or ane with convolutions for the Neural Engine.")
    ] = "gpu",
    prefill_length: Annotated[
        list[int],
        typer.Option(
            rich_help_panel=COREML,
            help="Positions that the decoder takes at once; given more than once, a function for each.",
        ),
    ] = [64],  # noqa: B006 (typer's own form)
    coreml_names: Annotated[
        str,
        typer.Option(
            rich_help_panel=COREML,
            help="mobilemm, or swift-transformers: of a text model a package for that library, no bundle.",
        ),
    ] = "mobilemm",
    backend: Annotated[
        str, typer.Option("--backend", rich_help_panel=EXECUTORCH, help="xnnpack, or portable (slow).")
    ] = "xnnpack",
    allow_fallback: Annotated[
        bool,
        typer.Option(
            "--allow-fallback", rich_help_panel=EXECUTORCH, help="Let operators run that no backend takes."
        ),
    ] = False,
    convolutions: Annotated[
        str,
        typer.Option(
            "--convolutions",
            rich_help_panel=EXECUTORCH,
            help="Of convolutional encoders in int8: float32, or int8 with calibrated steps (loses much).",
        ),
    ] = "float32",
    etrecord: Annotated[
        Path | None,
        typer.Option(
            "--etrecord",
            rich_help_panel=EXECUTORCH,
            help="Also write an ETRecord there, for ExecuTorch's Inspector; no part of the bundle.",
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell parts, sizes, memory and time to expect.")
    ] = False,
) -> None:
    """Quantize a model, convert it part by part, verify what was made, and bundle it for phones."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting"):
        from mobilemm.export.options import ExportOptions
        from mobilemm.export.quantization import make_plan
        from mobilemm.export.targets import find_target
        from mobilemm.runtime.pytorch import quiet

        quiet()
    names = list(dict.fromkeys(target))
    if output is not None and len(names) > 1:
        raise MobileMMError("with several targets leave -o out: each bundle is named NAME-TARGET")
    if kv_cache not in ("float32", "int8"):
        raise MobileMMError(f"--kv-cache {kv_cache!r}: choose float32 or int8")
    if kv_cache == "int8" and standard_ops:
        raise MobileMMError("--kv-cache int8 needs onnxruntime's own operators: leave --standard-ops out")
    if kv_cache == "int8" and "coreml" in names:
        raise MobileMMError("--kv-cache int8 is not for --target coreml")
    if dtype is not None:
        q_llm, q_embed = q_llm or dtype, q_embed or dtype
        q_vision, q_generator = q_vision or dtype, q_generator or dtype
    plan = make_plan(
        q_llm or "int4",
        embed=q_embed,
        vision=q_vision or "int8",
        generator=q_generator or "int8",
        method=q_method,
        block_size=block_size,
        symmetric=not asymmetric,
        keep=q_keep or (),
    )
    options = ExportOptions(
        plan=plan,
        context_length=max_seq_len,
        image_size=image_size,
        calibration=calibration,
        verify=verify,
        int8_cache=kv_cache == "int8",
        steps=steps,
        stepwise=stepwise,
        budget=None if q_search is None else int(q_search * 1e6),
    )
    flags: dict[str, dict[str, object]] = {
        "onnx": {
            "opset": opset,
            "standard_ops": standard_ops,
            "accuracy_level": accuracy_level,
            "ort_format": ort_format,
        },
        "coreml": {
            "minimum_deployment_target": minimum_deployment_target,
            "layout": coreml_layout,
            "prefill": prefill_length,
        },
        "executorch": {
            "backend": backend,
            "allow_fallback": allow_fallback,
            "convolutions": convolutions,
            "etrecord": etrecord,
        },
    }
    targets = [find_target(name, **flags.get(name, {})) for name in names]
    if coreml_names not in ("mobilemm", SWIFT_NAMES):
        raise MobileMMError(f"--coreml-names {coreml_names!r}: choose mobilemm or {SWIFT_NAMES}")
    if coreml_names == SWIFT_NAMES:
        if names != ["coreml"] or model is None or dry_run:
            raise MobileMMError(f"--coreml-names {SWIFT_NAMES} needs a text model and --target coreml alone")
        from mobilemm.export.targets.coreml import CoreMLTarget
        from mobilemm.export.targets.swift_transformers import export_text_model

        assert isinstance(targets[0], CoreMLTarget)
        place = output or Path(f"{Path(model).name}-{SWIFT_NAMES}")
        with console.status("") as status:
            parity = export_text_model(
                model,
                place,
                options,
                targets[0],
                overwrite=force,
                report=status.update,
            )
        text = "not verified"
        if parity is not None:
            text = f"cosine {parity.cosine:.5f} to fp32 PyTorch, conversion {parity.conversion_db:.0f} dB"
        Console().print(f"{place}: {text}", highlight=False, markup=False)
        return
    if dry_run:
        from mobilemm.export.plan_sizes import estimate

        for chosen in targets:
            _show_estimate(chosen.name, estimate(model, chosen, options), Console())
        return
    from mobilemm.export.assemble import export_bundles

    stem = Path(model).name if model else "mobilemm-default"
    places = [(chosen, output or Path(f"{stem}-{chosen.name}")) for chosen in targets]
    with console.status("") as status:

        def tell(text: str) -> None:
            if console.is_terminal and not text.startswith("warning:"):
                status.update(text)
            elif "(" not in text:  # no line for each layer
                console.print(text, highlight=False, soft_wrap=True)

        for result in export_bundles(model, places, options, overwrite=force, report=tell):
            _show(result, Console())


def _show(result: Result, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    manifest = result.bundle.manifest
    table = Table(title=escape(f"{result.bundle.folder}"), title_justify="left")
    for heading in ("part", "bits", "MB", "to fp32 PyTorch", "conversion", "s"):
        table.add_column(heading, justify="left" if heading in ("part", "to fp32 PyTorch") else "right")
    for name, record in result.records.items():
        part, parity = record.part, record.part.parity
        scheme = part.quantization
        bits = f"{scheme.bits}" + (f" / {scheme.block_size}" if scheme.block_size else "")
        text = "not verified"
        if parity is not None:
            text = f"cosine {parity.cosine:.5f}, {parity.snr_db:.1f} dB"
            if parity.top1 is not None:
                text += f", top-1 {parity.top1:.1%}, KL {parity.kl:.2g}"
        conversion = f"{parity.conversion_db:.0f} dB" if parity is not None else ""
        table.add_row(name, bits, f"{part.bytes / 1e6:,.1f}", text, conversion, f"{record.seconds:.0f}")
    total = sum(file.bytes for file in manifest.files)
    table.add_section()
    table.add_row("all files", "", f"{total / 1e6:,.1f}", "", "", "")
    console.print(table)
    for conversation in manifest.conversations:
        console.print(
            f"[dim]{escape(conversation.prompt)}[/]  bundle: {escape(conversation.answer)}", highlight=False
        )
    if result.pytorch_answer is not None:
        same = all(one.answer == result.pytorch_answer for one in manifest.conversations)
        console.print(
            f"[dim]{'the same as' if same else 'otherwise than'} PyTorch:[/] {escape(result.pytorch_answer)}",
            highlight=False,
        )
    for note in result.notes:
        console.print(escape(note), highlight=False, style="dim")


def _show_estimate(target: str, estimate: Estimate, console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"to expect for {target}", title_justify="left")
    for heading in ("part", "parameters", "bits", "MB"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in estimate.parts:
        table.add_row(part.name, f"{part.parameters:,}", f"{part.bits:.2f}", f"{part.bytes / 1e6:,.1f}")
    console.print(table)
    console.print(
        f"about {estimate.peak_memory / 1e9:.1f} GB of memory beside what is mapped from disk, and"
        f" {estimate.seconds / 60:.0f} to {3 * estimate.seconds / 60:.0f} minutes",
        highlight=False,
    )
