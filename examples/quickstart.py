# SPDX-License-Identifier: Apache-2.0
"""Learn a 2:4 mask on a frozen model, publish it, pack the model, load it back. About a quarter of an hour on 2 cores."""

# %%
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.data import TokenWindows, tokenize, windows

base = smollm2()  # or any Hub id or folder of a Llama-style model
tokenizer = AutoTokenizer.from_pretrained(base)
train, test = (tokenize([demo_text(split)], tokenizer) for split in ("train", "test"))

# %% A mask adapter on the frozen model, started from a good one-shot mask
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
print("dense      ", nms.perplexity(model, test[:8192], seq_len=1024).value)
config = nms.NMSparseConfig(pattern="2:4", prior="polish", temperature=(1.0, 0.2), logit_scale=(100.0, 300.0))
model = get_peft_model(model, config)
nms.set_prior(model, "polish", calibration=windows(train, 512, samples=64, seed=0))
print("one-shot   ", nms.perplexity(model, test[:8192], seq_len=1024).value)

# %% Learn the mask; no weight changes
arguments = TrainingArguments(
    "runs/quickstart",
    max_steps=45,
    per_device_train_batch_size=2,
    learning_rate=1.5e-3,
    logging_steps=5,
    save_strategy="no",
)
nms.NMSparseTrainer(model, arguments, train_dataset=TokenWindows(windows(train, 512, samples=90, seed=1))).train()
print("learned    ", nms.perplexity(model, test[:8192], seq_len=1024).value)

# %% Publish the mask (0.67 bit a weight), then pack the model (0.56 of the pruned layers' bytes)
nms.save_mask(model, "runs/quickstart/mask")
packed = nms.compress(model)
packed.save_pretrained("runs/quickstart/packed")

# %% What a user of the packed model types
model = AutoModelForCausalLM.from_pretrained("runs/quickstart/packed")
print("reloaded   ", nms.perplexity(model, test[:8192], seq_len=1024).value)
