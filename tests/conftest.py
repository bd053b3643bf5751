from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch_fidelity
from torch import nn

from util.extractors import INCEPTION_FILE, load_extractor


class RegisteredClassifier(torch_fidelity.FeatureExtractorBase):
    """The Fashion-MNIST classifier as torch-fidelity takes it, so that tests can compare with its own scores."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.classifier = load_extractor("fashion").networks["features", "logits"]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = dict(zip(("features", "logits"), self.classifier(images)))
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"


torch_fidelity.register_feature_extractor("fashion-classifier", RegisteredClassifier)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in the processes that torchrun starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the format of torch-fidelity's file."""
    path = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    torch.save({}, path)
    network_class = torch_fidelity.FeatureExtractorInceptionV3
    with mock.patch.object(network_class, "load_state_dict"), torch.random.fork_rng():
        torch.manual_seed(0)
        network = network_class("random", ["2048"], feature_extractor_weights_path=path)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(network.fc.weight, std=0.1)
    torch.save(network.state_dict(), path)
    return path
