"""ExecuTorch bundles on ExecuTorch's own runtime: one program, its methods the parts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.version import Version

from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.backends import Array, refuse_overflow
from mobilemm.runtime.embedding import embed_with_images
from mobilemm.runtime.executorch_check import METHODS

if TYPE_CHECKING:
    from mobilemm.runtime.bundle import Bundle


class ExecutorchBackend:
    """A `Backend` on ExecuTorch's Python runtime, whose kernels are those of the phones'.

    With `profiled`, programs record what operators take.
    Raises MobileMMError when executorch is missing, or older than the bundle asks for.
    """

    prefills_in_pieces = True

    def __init__(self, bundle: Bundle, threads: int | None = None, profiled: bool = False) -> None:
        _check_version(bundle)
        self.bundle, self.threads, self.profiled = bundle, threads, profiled
        self._programs: dict[str, ExecutorchProgram] = {}

    @property
    def runtime(self) -> str:
        return f"ExecuTorch {version('executorch')}"

    def load(self, part: str) -> None:
        program = self.program(part)
        # ExecuTorch loads a method with its first call. One token costs nothing; a picture is waited for.
        if part == "embed":
            program(METHODS[part], np.zeros((1, 1), np.int64))

    def release(self, part: str) -> None:
        self._programs.pop(part, None)

    def run(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        model = self.bundle.manifest.model
        output = self.bundle.manifest.parts[part].outputs[0].name
        program = self.program(part)
        if part == "vision":
            return {output: look(program, inputs["pixels"])}
        if part == "embed":
            rows = embed_with_images(
                lambda ids: program("token_embedding", ids),
                inputs["input_ids"],
                inputs["image_features"],
                model.image_token_id,
                model.vocab_size,
            )
            return {output: rows}
        wanted = [tensor.name for tensor in self.bundle.manifest.parts[part].inputs]
        return {output: program(METHODS[part], *(inputs[name] for name in wanted))}

    def decoder(self) -> ExecutorchDecoder:
        """Each has a program of its own: keys and values are part of it."""
        model, part = self.bundle.manifest.model, self.bundle.manifest.parts["decoder"]
        program = ExecutorchProgram(self.bundle.part_path("decoder"), self.threads, self.profiled)
        takes_positions = any(tensor.name == "position_ids" for tensor in part.inputs)
        decoder = ExecutorchDecoder(program, model.context_length, takes_positions)
        decoder.decode(np.zeros((1, 1, model.hidden_size), np.float32))  # loads it
        decoder.truncate(0)
        return decoder

    def program(self, part: str) -> ExecutorchProgram:
        """What runs a part, loaded if it was not; decoders have their own."""
        # One for each part, so that each can be given back; the file is mapped, not read, each time.
        if part not in self._programs:
            self._programs[part] = ExecutorchProgram(self.bundle.part_path(part), self.threads, self.profiled)
        return self._programs[part]


class ExecutorchProgram:
    """A .pte file; methods are loaded when they are first called.

    The mutable buffers of its methods, keys and values among them, live as long as it does.
    """

    def __init__(self, path: Path, threads: int | None = None, profiled: bool = False) -> None:
        self.path = path
        self._loaded: set[str] = set()
        with _quiet_stderr():
            runtime = _runtime()
            count = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0)
            if count and runtime._threadpool_get_thread_count() != count:
                runtime._unsafe_reset_threadpool(count)  # one pool for the process
            try:
                self._module = runtime._load_for_executorch(str(path), enable_etdump=profiled)
            except Exception as error:
                raise MobileMMError(f"{path}: cannot be loaded by executorch ({one_line(error)})") from error

    def __call__(self, method: str, *inputs: Array) -> Array:
        """The method's output, an array of its own. Raises MobileMMError when it fails."""
        import torch

        tensors = tuple(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs)
        first = method not in self._loaded
        try:
            with _quiet_stderr() if first else nullcontext():
                (output,) = self._module.run_method(method, tensors)
        except Exception as error:
            raise MobileMMError(f"{self.path}: method {method!r} failed ({one_line(error)})") from error
        self._loaded.add(method)
        return output.numpy()

    def write_profile(self, path: Path) -> None:
        """What operators took since it was loaded, as ETDump."""
        self._module.write_etdump_result_to_file(str(path), str(path.with_suffix(".debug")))


class ExecutorchDecoder:
    """A `Decoder` over the method `text_decoder`, whose keys and values are buffers of fixed length.

    The method gives the logits of the last position that it is fed: for those of others, it is fed in pieces
    that end there.
    """

    def __init__(
        self, program: ExecutorchProgram, context_length: int, takes_positions: bool = False
    ) -> None:
        self.program, self.context_length, self.takes_positions = program, context_length, takes_positions
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def decode(
        self, inputs_embeds: Array, position_ids: Array | None = None, logits_positions: Array | None = None
    ) -> Array:
        count = inputs_embeds.shape[1]
        total = self._length + count
        refuse_overflow(total, self.context_length)
        if self.takes_positions and position_ids is None:
            position_ids = np.broadcast_to(np.arange(self._length, total), (3, 1, count))
        wanted = np.array([-1] if logits_positions is None else logits_positions)
        wanted = np.where(wanted < 0, wanted + count, wanted)
        embeds = np.asarray(inputs_embeds, np.float32)
        made: dict[int, Array] = {}
        start = 0
        for end in sorted({int(position) + 1 for position in wanted} | {count}):
            inputs = [embeds[:, start:end], np.array([self._length + start])]
            if self.takes_positions and position_ids is not None:
                inputs.append(np.asarray(position_ids[..., start:end], np.int64))
            made[end - 1] = self.program(METHODS["decoder"], *inputs)
            start = end
        self._length = total
        return np.concatenate([made[int(position)] for position in wanted], 1)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"a cache of {self._length} positions cannot be cut to {length}")
        self._length = length


def look(program: ExecutorchProgram, pixels: Array) -> Array:
    """Features (images · tokens, width) of pictures, uint8 (images, 3, height, width), one by one."""
    return np.concatenate([program(METHODS["vision"], picture[None])[0] for picture in pixels])


def _runtime() -> Any:
    """ExecuTorch's module, with the operators of language models in it."""
    import torch

    for package, folder in (("executorch.kernels", "quantized"), ("executorch.extension.llm", "custom_ops")):
        spec = find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            for library in Path(root, folder).glob("lib*_ops_aot_lib.*"):
                torch.ops.load_library(library)
    try:
        # What `portable_lib` gives, without the seconds that it takes to import the exporter.
        from executorch.extension.pybindings import _C as runtime
    except ImportError:
        from executorch.extension.pybindings import portable_lib as runtime
    return runtime


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Sends nowhere what native code writes to stderr: ExecuTorch tells of processor files that it misses."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_version(bundle: Bundle) -> None:
    try:
        installed = version("executorch")
    except PackageNotFoundError as error:
        raise MobileMMError(
            "running this bundle needs executorch: pip install 'mobilemm[executorch]'"
        ) from error
    wanted = bundle.manifest.runtime.min_version
    if Version(installed) < Version(wanted):
        raise MobileMMError(
            f"{bundle.folder}: needs executorch {wanted} or newer, installed is {installed}:"
            " pip install --upgrade executorch"
        )
