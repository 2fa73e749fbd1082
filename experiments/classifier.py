"""A small CIFAR-10 classifier, whose features Frechet distances are measured in; trained here, its accuracy is reported."""

import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fewstep._disk import atomic_write
from fewstep.keyed import Keyed
from fewstep.training.data import Source

FEATURES = 64
WEIGHTS, FACTS = "classifier.safetensors", "classifier.json"


class Classifier(nn.Module):
    """Four convolutions; ``features(x)`` is (batch, 64), ``forward(x)`` class scores, for images in [-1, 1]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_stage(3, 32, 1),
            *_stage(32, 64, 2),
            *_stage(64, 128, 2),
            *_stage(128, 128, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.embed = nn.Linear(128, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """What distances are measured in."""
        return torch.relu(self.embed(self.body(x)))

    def features_and_spatial(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and where things are: (batch, 64), the third stage's 8 x 8 places averaged over channels."""
        places = self.body[:9](x)
        return torch.relu(self.embed(self.body[9:](places))), places.mean(1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.features(x))


def _stage(inside: int, outside: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


def classifier(
    folder: Path, train: Source, test: tuple[Tensor, Tensor], epochs: float, batch: int = 128
) -> tuple[Classifier, dict]:
    """The classifier in `folder`, trained if it is not there yet, with its facts (accuracy, epochs, seconds)."""
    net = Classifier()
    if (folder / FACTS).exists():
        net.load_state_dict(load_file(folder / WEIGHTS))
        return net.eval(), json.loads((folder / FACTS).read_text())
    assert train.size is not None
    steps, start = math.ceil(epochs * train.size / batch), time.process_time()
    torch.manual_seed(0)
    net = Classifier().train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step in range(steps):
        x, label = train.draw(Keyed(0, step, 0, batch), batch)
        assert label is not None
        loss = nn.functional.cross_entropy(net(x), label, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier: step {step}/{steps}, loss {float(loss.detach()):.3f}", flush=True)
    net.eval()
    with torch.no_grad():
        right = torch.cat([net(x).argmax(1) for x in test[0].split(500)]) == test[1]
    facts = {"test accuracy": float(right.double().mean()), "epochs": epochs, "features": FEATURES}
    facts["training CPU seconds"] = round(time.process_time() - start, 1)
    atomic_write(folder / WEIGHTS, save({k: v.contiguous() for k, v in net.state_dict().items()}))
    atomic_write(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    return net, facts


def embedded(net: Classifier, images: Tensor) -> Tensor:
    """Features of images in [-1, 1], float64."""
    with torch.no_grad():
        return torch.cat([net.features(x.clamp(-1, 1)).double() for x in images.split(500)])
