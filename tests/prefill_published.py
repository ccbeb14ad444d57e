"""What the authors' code chooses, as tests/prefill_published.json.

    python tests/prefill_published.py MINFERENCE XATTENTION

Arguments: checkouts of github.com/microsoft/MInference (fb56c91) and github.com/mit-han-lab/x-attention (e379887). Of
their files the index builders are run as they stand, on a CPU ("cuda" reads "cpu"); what they call on a GPU alone, the
attention that follows, and a Triton kernel that takes means of blocks, is replaced. Needs torch.
"""

import ast
import json
import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FLEX = {"length": 1024, "heads": 4, "kv_heads": 2, "head_dim": 16, "gamma": 0.9, "tau": 0.1, "min_budget": 1}
CROSS = {"length": 1000, "heads": 2, "head_dim": 16, "threshold": 0.8, "stride": 8, "chunk": 512}
SLASH = {"length": 1000, "head_dim": 16, "v": 100, "s": 200}
BLOCKS = {"length": 8300, "head_dim": 4}


def drawn(length, heads, head_dim, seed, scales=(1.0,)):
    """f32 [length, heads, head_dim]; heads of different sharpness."""
    x = np.random.default_rng(seed).normal(size=(length, heads, head_dim))
    return (x * np.resize(scales, heads)[:, None]).astype(np.float32)


def flex_inputs():
    size = FLEX["length"], FLEX["heads"], FLEX["head_dim"]
    return drawn(*size, 0, (3.0, 0.05, 1.0, 0.3)), drawn(
        FLEX["length"], FLEX["kv_heads"], FLEX["head_dim"], 1, (1.5, 0.5)
    )


def cross_inputs():
    size = CROSS["length"], CROSS["heads"], CROSS["head_dim"]
    return drawn(*size, 2, (4.0, 1.5)), drawn(*size, 3, (2.0,))


def slash_inputs():
    size = SLASH["length"], 1, SLASH["head_dim"]
    return drawn(*size, 4), drawn(*size, 5)


def block_inputs():
    size = BLOCKS["length"], 1, BLOCKS["head_dim"]
    return drawn(*size, 6), drawn(*size, 7)


def functions(path, names, **known):
    """Functions of a file by name, without what else it does or imports."""
    source = path.read_text(encoding="utf-8").replace('"cuda"', '"cpu"')
    body = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in body} == set(names)
    for node in body:
        node.decorator_list = []
    space = dict(known)
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space


def main(minference, xattention):
    import torch

    torch.cuda.current_device = lambda: "cpu"
    common = {"torch": torch, "math": math, "F": torch.nn.functional, "causal_mask": None}
    found = {}

    def heads_first(x):
        return torch.tensor(x).transpose(0, 1)[None]

    names = ["get_active_blocks", "score_cover_topk", "score_cover_idx", "sum_all_diagonal_matrix"]
    names += ["transform_veritcal_slash_idx", "square_root_js_divergence", "torch_bhn_sumpool"]

    def rearrange(x, how):
        assert how == "b h g i j -> b (h g) i j"
        return x.flatten(1, 2)

    def pool(x, block):
        return torch.stack([part.mean(1) for part in x.split(block, 1)], 1)

    flex = functions(
        minference / "minference/modules/flexprefill.py", names, **common, rearrange=rearrange, triton_bnhd_pool=pool
    )
    query, key = (torch.tensor(x)[None] for x in flex_inputs())
    options = FLEX["gamma"], FLEX["min_budget"], 10**9, FLEX["tau"]
    blocks = flex["get_active_blocks"](query, key, key, 128, *options)
    found["flex_prefill"] = [sorted(set(head.tolist())) for head in blocks[0]]

    find = functions(xattention / "xattn/src/utils.py", ["find_blocks_chunked"], **common)["find_blocks_chunked"]
    estimate = functions(xattention / "xattn/src/Xattention.py", ["xattn_estimate"], **common, find_blocks_chunked=find)
    query, key = map(heads_first, cross_inputs())
    options = {"threshold": CROSS["threshold"], "chunk_size": CROSS["chunk"], "use_triton": False}
    sums, mask = estimate["xattn_estimate"](query, key, 128, CROSS["stride"], **options)
    found["x_attention"] = mask[0].int().tolist()
    found["x_attention_sums"] = np.round(sums[0].double().numpy(), 6).tolist()

    chosen = {}
    forward = functions(
        minference / "minference/modules/minference_forward.py",
        ["minference_prefill_kernel", "sum_all_diagonal_matrix"],
        **common,
        LAST_Q_MASK=torch.tril(torch.ones(64, 64, dtype=torch.bool))[None, None],
        vertical_slash_sparse_attention=lambda q, k, v, vertical, slash: chosen.update(v=vertical, s=slash),
        streaming_forward=None,
        block_sparse_attention=None,
    )
    query, key = map(heads_first, slash_inputs())
    table = {"best_pattern": [{"0": ["vertical_and_slash", SLASH["v"], SLASH["s"], 1]}]}
    forward["minference_prefill_kernel"](query, key, key, 0, 0, table)
    found["vertical"], found["slash"] = (sorted(chosen[name].flatten().tolist()) for name in "vs")

    build = functions(minference / "minference/ops/block_sparse_flash_attention.py", ["_build_block_index"], **common)
    query, key = map(heads_first, block_inputs())
    more = 64 - BLOCKS["length"] % 64
    query, key = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (query, key))
    index = build["_build_block_index"](query, key, 100)[0, 0].numpy()
    keep = np.zeros((len(index), len(index)), bool)
    np.put_along_axis(keep, index.astype(np.int64), True, axis=1)
    found["block_sparse"] = np.packbits(np.tril(keep)).tobytes().hex()
    (HERE / "prefill_published.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
