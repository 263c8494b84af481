# SPDX-License-Identifier: Apache-2.0
"""The only file that touches private state of peft or transformers: each piece names its version and when it can go."""

from __future__ import annotations
