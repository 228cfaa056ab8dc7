"""What the makers of tiny transformers models share: directories, hooks, errors and `golden.npz`.

Needs numpy 2, torch (CPU), safetensors and transformers 5; only the makers import it, never a test.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

FOLDER = pathlib.Path(__file__).parent
MAX_BYTES = 500_000
MIN_GAP = 1e-3
BATCH, LENGTH = 2, 24

Arrays = dict[str, npt.NDArray[Any]]


def be_quiet() -> None:
    """One thread, no progress bars, no warnings."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def write_model(folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """`config.json` and `model.safetensors`, of numpy arrays or torch tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    as_torch = {key: torch.from_numpy(t) if isinstance(t, np.ndarray) else t for key, t in tensors.items()}
    path = folder / "model.safetensors"
    safetensors.torch.save_file(as_torch, path, metadata={"format": "pt"})
    path.chmod(0o644)


def load(folder: pathlib.Path) -> Any:
    """The directory as transformers loads it, with its plainest attention and expert code."""
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, architecture).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return model.eval()


def moe_layers(model: Any) -> list[int]:
    """Numbers of the decoder layers that have routed experts."""
    return [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]


def check_loaded(model: Any, weights: Arrays) -> None:
    """Asserts that every tensor arrived where its key says, stacked experts and Mixtral's names included."""
    mixtral = model.config.model_type == "mixtral"
    gate_name, up_name, down_name = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    for layer in moe_layers(model):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate_up, down = state.pop(f"{prefix}.gate_up_proj"), state.pop(f"{prefix}.down_proj")
        width = down.shape[-1]
        for expert in range(len(down)):
            state[f"{prefix}.{expert}.{gate_name}.weight"] = gate_up[expert, :width]
            state[f"{prefix}.{expert}.{up_name}.weight"] = gate_up[expert, width:]
            state[f"{prefix}.{expert}.{down_name}.weight"] = down[expert]
    if mixtral:
        state = {key.replace(".mlp.", ".block_sparse_moe."): value for key, value in state.items()}
    if model.config.tie_word_embeddings:
        assert np.array_equal(state.pop("lm_head.weight"), state["model.embed_tokens.weight"])
    assert state.keys() == weights.keys(), state.keys() ^ weights.keys()
    assert all(np.array_equal(state[key], value) for key, value in weights.items())


def run(model: Any, tokens: npt.NDArray[np.int32]) -> Arrays:
    """Logits and everything on the way, caught by hooks; experts in whatever order transformers returns them."""
    caught: dict[str, list[Any]] = {"router": [], "hidden": [], "attention": []}
    layers = model.model.layers
    hooks = [layer.register_forward_hook(lambda _m, _i, out: caught["hidden"].append(out)) for layer in layers]
    hooks += [
        layers[number].mlp.gate.register_forward_hook(lambda _m, _i, out: caught["router"].append(out))
        for number in moe_layers(model)
    ]
    hooks.append(layers[0].self_attn.register_forward_hook(lambda _m, _i, out: caught["attention"].append(out[0])))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits
    for hook in hooks:
        hook.remove()

    def stacked(position: int) -> npt.NDArray[Any]:
        return np.stack([out[position].numpy().reshape(*tokens.shape, -1) for out in caught["router"]])

    return {
        "logits": logits.numpy(),
        "router_logits": stacked(0),
        "router_indices": stacked(2).astype(np.int32),
        "router_weights": stacked(1),
        "hidden": torch.stack(caught["hidden"]).numpy(),
        "attention_0": caught["attention"][0].numpy(),
    }


def run_expert(model: Any, layer: int, expert: int, inputs: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """One expert's output for every row of `inputs`, with routing weight 1."""
    experts = model.model.layers[layer].mlp.experts
    rows = torch.from_numpy(inputs).to(experts.down_proj.dtype)
    with torch.no_grad():
        chosen = torch.full((len(rows), 1), expert)
        return experts(rows, chosen, torch.ones(len(rows), 1, dtype=rows.dtype)).numpy()


def float32_errors(golden: Arrays, exact: Arrays) -> dict[str, float]:
    """Largest difference of each output from its float64 counterpart; the same experts must have been chosen."""
    assert np.array_equal(exact["router_indices"], golden["router_indices"])
    return {key: float(np.max(np.abs(exact[key] - golden[key]))) for key in golden if key != "router_indices"}


def versions() -> dict[str, str]:
    """What the values were made with."""
    modules = (transformers, torch, safetensors, np)
    return {module.__name__: module.__version__ for module in modules}


def write_golden(folder: pathlib.Path, metadata: Mapping[str, Any], arrays: Arrays) -> None:
    """`golden.npz`, float32 and int32 only (but for a bfloat16 matrix as uint16)."""
    allowed = {"router_indices": np.int32, "tokens": np.int32, "dequantised": np.uint16}
    assert all(value.dtype == allowed.get(key, np.float32) for key, value in arrays.items())
    np.savez_compressed(folder / "golden.npz", allow_pickle=False, metadata=np.array(json.dumps(metadata)), **arrays)


def check_sizes(folder: pathlib.Path) -> dict[str, int]:
    """Bytes of each file of the folder, none of which may be large."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    assert max(sizes.values()) < MAX_BYTES, sizes
    return sizes
