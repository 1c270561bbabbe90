"""ONNX bundles on onnxruntime, keys and values in buffers that stay where they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.version import Version

from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.backends import Array, refuse_overflow

if TYPE_CHECKING:
    from mobilemm.runtime.bundle import Bundle

FIRST_LENGTH = 1024
"""Positions that a cache has room for at first; it doubles when it is full."""

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OnnxBackend:
    """A `Backend` on onnxruntime's CPU kernels; into `profiles`, a folder, it writes what operators took.

    Raises MobileMMError when onnxruntime is missing, or older than the bundle asks for.
    """

    prefills_in_pieces = False

    def __init__(self, bundle: Bundle, threads: int | None = None, profiles: Path | None = None) -> None:
        _check_version(bundle)
        self.bundle, self.profiles = bundle, profiles
        self.threads = cores() if threads is None else threads
        self._sessions: dict[str, Any] = {}

    @property
    def runtime(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def load(self, part: str) -> None:
        self.session(part)

    def release(self, part: str) -> None:
        self._sessions.pop(part, None)

    def run(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        session = self.session(part)
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            raise MobileMMError(
                f"{self.bundle.part_path(part)}: part {part!r} failed ({one_line(error)})"
            ) from error

    def decoder(self) -> OnnxDecoder:
        path, model = self.bundle.part_path("decoder"), self.bundle.manifest.model
        concatenated = self.bundle.manifest.parts["decoder"].cache == "concatenated"
        return OnnxDecoder(self.session("decoder"), model.context_length, path, concatenated)

    def session(self, part: str) -> Any:
        """onnxruntime's InferenceSession of a part, loaded if it was not."""
        if part not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
            options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
            options.log_severity_level = 3
            if self.profiles is not None:
                options.enable_profiling = True
                options.profile_file_prefix = str(self.profiles / part)
            path = self.bundle.part_path(part)
            try:
                self._sessions[part] = onnxruntime.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                raise MobileMMError(f"{path}: cannot be loaded by onnxruntime ({one_line(error)})") from error
        return self._sessions[part]


class OnnxDecoder:
    """A `Decoder`: the session, and one conversation's keys and values.

    A graph whose attention writes into the buffers that it reads from gets each buffer as input and as
    output, allocated and bound once; the length of `attention_mask` says how much of them counts. They begin
    with room for FIRST_LENGTH positions and are copied into buffers twice as long when that is not enough.
    Of a graph that concatenates, each step's outputs are the next step's inputs.
    """

    def __init__(self, session: Any, context_length: int, file: Path, concatenated: bool = False) -> None:
        import onnxruntime

        self._ort = onnxruntime
        self._session, self._file = session, file
        self.context_length, self.concatenated = context_length, concatenated
        inputs = {value.name: value for value in session.get_inputs()}
        optional = {value.name: value for value in session.get_overridable_initializers()}
        self._past = [name for name in inputs if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        self._takes_positions = "position_ids" in inputs
        self._takes_logits_positions = "logits_positions" in inputs or "logits_positions" in optional
        outputs = {value.name: value for value in session.get_outputs()}
        missing = ({"inputs_embeds", "attention_mask"} - inputs.keys()) | (
            {"logits", *self._present} - outputs.keys()
        )
        if missing or not self._past:
            raise MobileMMError(f"{file}: not a decoder, it lacks {', '.join(sorted(missing)) or 'a cache'}")
        for name in ("inputs_embeds", *self._past):
            shape = inputs[name].shape
            if inputs[name].type not in DTYPES or (
                name in self._past and not (len(shape) == 4 and type(shape[1]) is type(shape[3]) is int)
            ):
                raise MobileMMError(f"{file}: input {name!r} is {inputs[name].type} {shape}, unknown here")
        self._embeds_dtype = DTYPES[inputs["inputs_embeds"].type]
        self._shapes = {name: (inputs[name].shape[1], inputs[name].shape[3]) for name in self._past}
        self._dtypes = {name: DTYPES[inputs[name].type] for name in self._past}
        self._length = 0
        self._capacity = 0
        self._mask = np.ones((1, 0), np.int64)
        self._binding = session.io_binding()
        self._binding.bind_output("logits")  # first, so that it is the first of the outputs
        # One position's logits, as each step asks for them, into memory that stays where it is.
        vocabulary = outputs["logits"].shape[2]
        steps = self._takes_logits_positions and not concatenated and isinstance(vocabulary, int)
        dtype = DTYPES[outputs["logits"].type]
        self._logits = np.zeros((1, 1, vocabulary), dtype) if steps else None
        self._logits_value = None if self._logits is None else self._ort_value(self._logits)
        self._arrays = self._allocate(0)
        self._values = {name: self._ort_value(array) for name, array in self._arrays.items()}

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        """How many positions the buffers have room for."""
        return self._capacity

    def decode(
        self, inputs_embeds: Array, position_ids: Array | None = None, logits_positions: Array | None = None
    ) -> Array:
        total = self._length + inputs_embeds.shape[1]
        refuse_overflow(total, self.context_length)
        self._reserve(total)
        binding = self._binding
        # Arrays that are bound must live until the run is over.
        feeds = {
            "inputs_embeds": np.ascontiguousarray(inputs_embeds, self._embeds_dtype),
            "attention_mask": self._mask[:, :total],
        }
        if self._takes_positions:
            if position_ids is None:
                position_ids = np.broadcast_to(np.arange(self._length, total), (3, 1, inputs_embeds.shape[1]))
            feeds["position_ids"] = np.ascontiguousarray(position_ids, np.int64)
        if self._takes_logits_positions:
            wanted = np.array([-1]) if logits_positions is None else logits_positions
            feeds["logits_positions"] = np.ascontiguousarray(wanted, np.int64)
        for name, array in feeds.items():
            # Not bind_cpu_input, which does not know inputs that have a default.
            binding.bind_ortvalue_input(name, self._ort_value(array))
        one = self._logits is not None and (logits_positions is None or len(logits_positions) == 1)
        if one:
            binding.bind_ortvalue_output("logits", self._logits_value)
        else:  # afresh each time, since the shape changes
            binding.bind_output("logits")
        if self.concatenated:
            for past, present in zip(self._past, self._present, strict=True):
                binding.bind_ortvalue_input(past, self._values[past])
                binding.bind_output(present)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise MobileMMError(f"{self._file}: the decoder failed ({one_line(error)})") from error
        if one and self._logits is not None:
            self._length = total
            return self._logits.astype(np.float32)
        values = binding.get_outputs()
        kept = dict(zip(self._past, values[1:], strict=True)) if self.concatenated else self._values
        self._values, self._length = kept, total
        logits = values[0].numpy()
        if not self._takes_logits_positions:
            logits = logits[:, [-1] if logits_positions is None else logits_positions]
        return logits.astype(np.float32, copy=False)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"a cache of {self._length} positions cannot be cut to {length}")
        if self.concatenated and length < self._length:
            for name, value in self._values.items():
                self._values[name] = self._ort_value(np.ascontiguousarray(value.numpy()[:, :, :length]))
        self._length = length

    def _reserve(self, total: int) -> None:
        """Makes room for that many positions."""
        if self._mask.shape[1] < total:
            self._mask = np.ones((1, _room(total, self.context_length)), np.int64)
        if self.concatenated or total <= self._capacity:
            return
        capacity = _room(max(total, FIRST_LENGTH), self.context_length)
        self._capacity = 0  # whatever interrupts this, it will be done again
        arrays = self._allocate(capacity)
        for name, array in arrays.items():
            array[:, :, : self._length] = self._arrays[name][:, :, : self._length]
        self._arrays = arrays
        self._values = {name: self._ort_value(array) for name, array in arrays.items()}
        for past, present in zip(self._past, self._present, strict=True):
            self._binding.bind_ortvalue_input(past, self._values[past])
            self._binding.bind_ortvalue_output(present, self._values[past])
        self._capacity = capacity

    def _allocate(self, capacity: int) -> dict[str, Array]:
        return {
            name: np.zeros((1, heads, capacity, width), self._dtypes[name])
            for name, (heads, width) in self._shapes.items()
        }

    def _ort_value(self, array: Array) -> Any:
        """onnxruntime's view of an array; on a CPU it shares the memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def _room(total: int, context_length: int) -> int:
    """The next power of two, but no more than the context."""
    return min(1 << (total - 1).bit_length(), context_length)


def cores() -> int:
    """Threads to run with: 0 lets onnxruntime take the physical cores, unless this process may use fewer."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
        if allowed < (os.cpu_count() or allowed):
            return allowed
    return 0


def _check_version(bundle: Bundle) -> None:
    try:
        import onnxruntime
    except ImportError as error:
        raise MobileMMError("running a bundle needs onnxruntime: pip install 'mobilemm[onnx]'") from error
    wanted = bundle.manifest.runtime.min_version
    if Version(onnxruntime.__version__) < Version(wanted):
        raise MobileMMError(
            f"{bundle.folder}: needs onnxruntime {wanted} or newer, installed is {onnxruntime.__version__}:"
            " pip install --upgrade onnxruntime"
        )
