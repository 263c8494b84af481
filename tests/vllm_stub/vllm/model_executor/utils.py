# SPDX-License-Identifier: Apache-2.0
def set_weight_attrs(weight, attributes):
    for name, value in (attributes or {}).items():
        setattr(weight, name, value)
