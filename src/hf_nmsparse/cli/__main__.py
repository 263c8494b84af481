# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_nmsparse.cli` is `nmsparse`."""

from .main import main

if __name__ == "__main__":
    main()
