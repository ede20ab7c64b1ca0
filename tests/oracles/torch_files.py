"""Writes tests/pretrained/files: small checkpoints in every form that torch saves, and the tensors in them.

    python tests/oracles/torch_files.py        (torch 2.14; the tests themselves need no torch)

`expected.npz` holds every tensor, as float32 where numpy has no such dtype, under "<file>/<name>".
"""

import argparse
import collections
from pathlib import Path
import zipfile

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "pretrained" / "files"


def tensors() -> dict[str, torch.Tensor]:
    """One tensor of every kind that files hold."""
    torch.manual_seed(0)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    made = {f"dtype.{kind}".replace("torch.", ""): torch.randn(3, 2).mul(9).to(kind) for kind in DTYPES}
    return {
        **made,
        "base": base,
        "transposed": base.T,
        "row": base[2],
        "every_other": base[1:, ::2],
        "expanded": torch.arange(3).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    }


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class Attention(nn.Module):
    """Nested, with a buffer, and with constants that are no tensors."""

    def __init__(self, width: int):
        super().__init__()
        self.heads, self.scale, self.name = 2, 0.5, "attention"
        self.proj = nn.Linear(width, width)
        self.register_buffer("counts", torch.tensor([1, 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * self.scale + self.counts.sum()


class Net(nn.Module):
    """The shape of CLIP's archives in small: a vision tower, a parameter at the top, blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            collections.OrderedDict(conv1=nn.Conv2d(3, 4, 2, 2, bias=False), flat=nn.Flatten(2))
        )
        self.blocks = nn.ModuleList([Attention(4), Attention(4)])
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.sizes = [1, 2, 3]
        self.extra = (torch.ones(2), "text")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.visual(x).transpose(1, 2)
        for block in self.blocks:
            y = block(y)
        return y * self.logit_scale.exp()


def training_state(model: nn.Module) -> dict[str, object]:
    """What a training script leaves: as those of DeiT and MAE, with what else turns up in the wild."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    return {
        "model": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"best": np.float64(0.5), "milestones": collections.Counter([3, 3, 5])},
        "epoch": 7,
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "args": argparse.Namespace(
            lr=0.1,
            device=torch.device("cuda", 0),
            output_dir=Path("runs") / "one",
            dtype=torch.float16,
            names={"a", "b"},
        ),
        "rng": np.arange(4, dtype=np.uint32),
        "best": np.float32(0.25),
        "shape": torch.Size([2, 3]),
        "seen": collections.defaultdict(list, {"x": [1]}),
        "model_ema": {"decoy": torch.zeros(1)},
    }


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def without_sources(path: Path) -> None:
    """Drops the members that name the source files of the machine that this ran on."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".debug_pkl")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    expected = {}

    def save(name: str, content: object, held: dict[str, torch.Tensor], **options: object) -> None:
        torch.save(content, FOLDER / name, **options)
        expected.update({f"{name}/{key}": as_numpy(value) for key, value in held.items()})

    old = {"_use_new_zipfile_serialization": False}
    everything = tensors()
    save("zip.pth", everything, everything)
    save("legacy.pth", everything, everything, **old)
    save("protocol4.pth", everything, everything, pickle_protocol=4)

    torch.manual_seed(1)
    model = Net()
    state = model.state_dict()
    training = training_state(model)
    save("training.pth", training, model.state_dict())
    save("training_legacy.pth", training, model.state_dict(), **old)
    save("pytorch_model.bin", state, model.state_dict())

    for name, make in {
        "traced.pt": lambda: torch.jit.trace(model, torch.randn(1, 3, 4, 4)),
        "scripted.pt": lambda: torch.jit.script(model.half()),
    }.items():
        script = make()
        script.save(FOLDER / name)
        without_sources(FOLDER / name)
        expected.update({f"{name}/{key}": as_numpy(value) for key, value in script.state_dict().items()})
    save("module.pth", nn.Conv2d(1, 1, 1), {})  # a whole object, which is refused
    np.savez_compressed(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    main()
