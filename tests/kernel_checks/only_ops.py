# SPDX-License-Identifier: Apache-2.0
"""Import this first for `hf_nmsparse.ops` alone: the package as a whole also loads transformers and peft, which takes seconds."""

import importlib.util
import sys
from types import ModuleType

if "hf_nmsparse" not in sys.modules:
    package = ModuleType("hf_nmsparse")
    package.__path__ = importlib.util.find_spec("hf_nmsparse").submodule_search_locations
    sys.modules["hf_nmsparse"] = package
