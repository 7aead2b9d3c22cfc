"""One name for a module or parameter in every layout."""

from torch import nn

from graftwork.parallel.state import ep_rank


def global_name(root: nn.Module, path: str) -> str:
    """Translate a path inside one model chunk to the name it has in a one-process model.

    Layers count over all pipeline stages, experts over all expert-parallel ranks.
    """
    parts = path.split(".")
    for i, part in enumerate(parts[:-1]):
        if not parts[i + 1].isdigit():
            continue
        if part == "layers":
            number = getattr(root.get_submodule(".".join(path.split(".")[: i + 2])), "layer_number")  # noqa: B009
            parts[i + 1] = str(int(number) - 1)
        elif part == "local_experts":
            experts = root.get_submodule(".".join(path.split(".")[: i + 1]))
            parts[i + 1] = str(ep_rank() * len(list(experts.children())) + int(parts[i + 1]))
    return ".".join(parts)


def in_expert(name: str) -> bool:
    """Tell whether a module or parameter of this name belongs to one expert of a mixture."""
    return ".experts." in f".{name}"
