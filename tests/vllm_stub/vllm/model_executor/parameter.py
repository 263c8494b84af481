# SPDX-License-Identifier: Apache-2.0
import torch


class ModelWeightParameter(torch.nn.Parameter):
    """A parameter that knows which of its dimensions are inputs and outputs, and how to be loaded."""

    def __new__(cls, data, **kwargs):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, input_dim, output_dim, weight_loader):
        self.input_dim, self.output_dim, self.weight_loader = input_dim, output_dim, weight_loader
