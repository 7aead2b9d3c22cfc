"""Targets that match nothing, alone or among good ones, are refused; nothing is attached."""

import pytest

from graftwork.errors import MatchError
from graftwork.peft import LoRA
from tests.helpers import tiny_run


@pytest.mark.fault(
    "a mistyped target among good ones is accepted, and its modules stay untrained",
    "every target must match a module; the near ones are named",
)
@pytest.mark.parametrize("targets", [["linear_qvk"], ["linear_proj", "linear_qvk"], ["*.linear_fc1", "layers.7.*"]])
def test_a_target_that_matches_nothing_is_refused(targets: list[str]) -> None:
    model = tiny_run.model()
    model.configure_model()
    with pytest.raises(MatchError, match=r"target '(linear_qvk|layers\.7\.\*)' matches no module.*(linear_qkv|valid)"):
        model.add_adapter(LoRA(dim=2, target_modules=targets))
    assert not model.adapters and not any(".adapters." in name for name, _ in model.named_parameters())
