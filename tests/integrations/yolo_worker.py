"""One of two processes that train one step of FBKDTrainer over gloo, and note its batch and its gradients.

    python yolo_worker.py FOLDER DATA LOSS

RANK and the rest of torch.distributed's environment say which. Ultralytics has no several processes on CPUs, so what it
does for GPUs is put in its place here: the process group and DistributedDataParallel without devices.
"""

import ast
import contextlib
import sys
from pathlib import Path

import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer

from fbkd_ops.integrations.ultralytics import FBKDTrainer

SETTINGS = dict(imgsz=64, batch=4, nbs=4, epochs=1, warmup_epochs=0, optimizer="SGD", device="cpu", workers=0)
SETTINGS |= dict(plots=False, verbose=False, val=False, mosaic=0.0, task="detect", exist_ok=True)


class Done(Exception):
    pass


class Trainer(FBKDTrainer):
    def _setup_ddp(self):
        torch.distributed.init_process_group("gloo")


def note_gradients(trainer):
    """In the place of Ultralytics' own step: what FBKDTrainer does before it has been done."""
    modules = {"student": trainer.model.module, "fbkd": trainer.fbkd}
    trainer.grads = {side: grads_of(module) for side, module in modules.items()}
    raise Done


def grads_of(module):
    return {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}


def main(folder: Path, data: str, **arguments) -> None:
    parallel = nn.parallel.DistributedDataParallel
    nn.parallel.DistributedDataParallel = lambda module, device_ids, **options: parallel(module, **options)
    BaseTrainer.optimizer_step = note_gradients
    seen = {}

    def start(trainer):
        model = trainer.model.module
        seen["model"] = {name: value.clone() for name, value in model.state_dict().items()}
        seen["fbkd"] = {name: value.clone() for name, value in trainer.fbkd.state_dict().items()}

    def before(trainer):
        for module in trainer.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        preprocess = trainer.preprocess_batch

        def noted(batch):
            seen["batch"] = preprocess(batch)
            return seen["batch"]

        trainer.preprocess_batch = noted

    overrides = SETTINGS | dict(model="yolo11n.yaml", data=data, project=str(folder), name="run")
    overrides |= arguments.pop("overrides", {})
    trainer = Trainer(teacher="yolo11s.yaml", overrides=overrides, **arguments)
    trainer.world_size = 2
    trainer.add_callback("on_train_start", start)
    trainer.add_callback("on_train_batch_start", before)
    with contextlib.suppress(Done):
        trainer.train()
    rank = torch.distributed.get_rank()
    kept = seen | {"grads": trainer.grads, "args": trainer.args, "teacher": trainer.teacher.state_dict()}
    torch.save(kept, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], **ast.literal_eval(sys.argv[3]))
