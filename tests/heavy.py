"""What every forked rank would import for itself, seconds of CPU time each: the fork server imports it once."""

from importlib import import_module

from trainer.deepspeed_internals import import_deepspeed

import_deepspeed()
for name in (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.pyplot",
    "peft",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "convert.to_hf",
    "pretrain.train",
    "trainer.loop",
    "tune.train",
    "tune.tuner",
):
    import_module(name)
