"""Core ML's protobuf classes out of coremltools, without coremltools itself.

Importing coremltools takes many seconds, imports torch and prints warnings; its folder `proto` needs nothing
but protobuf.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from mobilemm.errors import MobileMMError

# The folder is imported under a name of its own where coremltools has not been imported. Should that follow,
# protobuf finds the same descriptors registered and both names lead to the same classes.
ALIAS = "_mobilemm_coreml_proto"


@cache
def coreml_protobuf() -> tuple[ModuleType, ModuleType]:
    """The modules Model_pb2 and MIL_pb2. Raises MobileMMError when coremltools is not installed."""
    package = ALIAS
    if "coremltools.proto" in sys.modules:
        package = "coremltools.proto"
    elif ALIAS not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise MobileMMError("reading Core ML packages needs coremltools: pip install 'mobilemm[coreml]'")
        folder = Path(found.submodule_search_locations[0]) / "proto"
        spec = importlib.util.spec_from_file_location(
            ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise MobileMMError("this coremltools has no folder 'proto': pip install 'mobilemm[coreml]'")
        module = importlib.util.module_from_spec(spec)
        sys.modules[ALIAS] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{package}.Model_pb2"), importlib.import_module(f"{package}.MIL_pb2")
