"""transformers' own tests of a model, for eight families of MoE models; run by `judge.py`."""

import unittest

import torch
from generation_tests import GenerationTests
from judged import FAMILIES
from model_tester import ModelTester
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin

torch.set_num_threads(1)


class _Family(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, GenerationTests):
    family = ""
    model_tester = None
    all_model_classes = ()
    test_all_params_have_gradient = False  # an expert that no token of a small batch chose has none

    def setUp(self):
        self.model_tester = ModelTester(self.family)
        self.all_model_classes = self.model_tester.model_classes


for _family, _name in FAMILIES.items():
    globals()[_name] = type(_name, (_Family, unittest.TestCase), {"family": _family, "__module__": __name__})
