# SPDX-License-Identifier: Apache-2.0
"""Learn a 2:4 mask on frozen weights, then train the kept weights under it, both taught by the dense base; pack the result.

python examples/two_phases.py [STEPS_OF_EACH_PHASE]          # about 25 minutes on 2 cores
"""

# %%
import copy
import sys

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.data import TokenWindows, tokenize, windows

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
source = smollm2()  # or any Hub id or folder of a Llama-style model
tokenizer = AutoTokenizer.from_pretrained(source)
train, test = (tokenize([demo_text(split)], tokenizer) for split in ("train", "test"))
calibration = windows(train, 512, samples=64, seed=0)
data = TokenWindows(windows(train, 512, samples=2 * steps, seed=1))
base = AutoModelForCausalLM.from_pretrained(source, dtype="auto")


def fit(model, learning_rate: float) -> None:
    arguments = TrainingArguments(
        "runs/two_phases",
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
    )
    nms.NMSparseTrainer(model, arguments, train_dataset=data, distillation=nms.Distillation()).train()


def show(row: str, model) -> None:
    print(f"{row:24}", round(nms.perplexity(model, test[:8192], seq_len=1024).value, 2), flush=True)


# %% Which weights: a mask over the frozen base
show("dense", base)
config = nms.NMSparseConfig(pattern="2:4", prior="polish", temperature=(1.0, 0.2), logit_scale=(100.0, 300.0))
learned = get_peft_model(copy.deepcopy(base), config)
nms.set_prior(learned, "polish", calibration=calibration)
show("one-shot", learned)
fit(learned, 1.5e-3)
show("learned mask", learned)
mask = {name: layer.hard_mask("default") for name, layer in mask_layers(learned).items()}
del learned

# %% What values: the kept weights under that mask, and SLoRB beside them
config = nms.NMSparseConfig(pattern="2:4", relaxation="ast", mask_interval=None, prior=None, slorb_block=16)
trained = get_peft_model(base, config)
nms.set_prior(trained, mask)
fit(trained, 5e-5)
show("weights under the mask", trained)

# %% Packed: 0.56 of the bytes of the pruned layers, and SLoRB beside them
packed = nms.compress(trained)
show("packed", packed)
packed.save_pretrained("runs/two_phases/packed")
