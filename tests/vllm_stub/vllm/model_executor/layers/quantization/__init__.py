# SPDX-License-Identifier: Apache-2.0
QUANTIZATION_METHODS = ["fp8"]
_REGISTERED = {}


def register_quantization_config(name):
    def register(config_class):
        if name in QUANTIZATION_METHODS:
            raise ValueError(f"{name} is registered already")
        QUANTIZATION_METHODS.append(name)
        _REGISTERED[name] = config_class
        return config_class

    return register


def get_quantization_config(name):
    return _REGISTERED[name]
