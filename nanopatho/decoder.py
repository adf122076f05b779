"""The Qwen2.5 decoder: grouped-query attention with biased q, k, v, multimodal rotary positions, SwiGLU, KV cache.

Source: arXiv 2412.15115 (Qwen2.5), arXiv 2409.12191 section 2.1 (M-RoPE), and the published weights, whose parameter
names the module tree reproduces (`model.layers.0.self_attn.q_proj.weight`, ...). Needs attention.py and projector.py
(RMSNorm) beside it.

Letters: B rows, T tokens, E hidden width, Hq query heads, Hk key/value heads, D head width.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attention, rotary_tables, rotate, swiglu
from .projector import RMSNorm


def mrope(positions: Tensor, head_width: int, theta: float, sections: list[int], dtype=torch.float32):
    """positions (3, B, T): time, row, column of every token -> cos, sin (B, T, 1, D).

    The D/2 frequencies are dealt out in three runs of lengths `sections`: slow-turning ones are the last. Text has the
    same number on all three axes, so for text this is ordinary rotary embedding. Angles in fp32: at position 30,000
    bf16 is off by 64.
    """
    device = positions.device
    frequency = theta ** -(torch.arange(0, head_width, 2, device=device) / head_width)  # (D/2,)
    axis = torch.arange(3).repeat_interleave(torch.tensor(sections)).to(device)  # (D/2,) which position turns it
    angles = positions[axis].permute(1, 2, 0) * frequency  # (D/2, B, T) -> (B, T, D/2)
    return rotary_tables(angles.unsqueeze(2), dtype)


class KVCache:
    """Keys and values of all layers, allocated once: k, v (layers, B, Hk, capacity, D), `length` of it filled."""

    def __init__(self, layers: int, rows: int, heads: int, capacity: int, head_width: int, dtype, device):
        self.k = torch.empty(layers, rows, heads, capacity, head_width, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, Hk, T, D) behind the filled part of this layer; return all keys and values so far (views)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of new tokens: q (B, Hq, T, D) over the kept keys and k, v (B, Hk, T, D) -> (B, Hq, T, D).

        Whatever is given to Decoder.forward as `cache` has this method: see generate.py, packed.py, Documents."""
        k, v = self.append(layer, k, v)
        return attention(q, k, v, causal=mask is None and q.shape[2] > 1, mask=mask)


class Attention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        width, self.heads, self.kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        self.head_width = width // self.heads
        self.q_proj = nn.Linear(width, self.heads * self.head_width)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_width)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_width)
        self.o_proj = nn.Linear(self.heads * self.head_width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int):
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.heads, -1), cos, sin).transpose(1, 2)  # (B, Hq, T, D)
        k = rotate(self.k_proj(x).view(B, T, self.kv_heads, -1), cos, sin).transpose(1, 2)  # (B, Hk, T, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        if cache is None:
            y = attention(q, k, v, causal=mask is None, mask=mask)
        else:
            y = cache.attend(layer, q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, c: dict):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """c: the flat configuration (see vlm.parse_config)."""

    def __init__(self, c: dict):
        super().__init__()
        self.head_width = c["hidden_size"] // c["num_attention_heads"]
        self.theta, self.sections = c["rope_theta"], c["rope_scaling"]["mrope_section"]
        self.recompute = False  # as in vit.py
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (3, B, T) -> cos, sin (B, T, 1, D) in the dtype of the weights, as the published model does."""
        return mrope(positions, self.head_width, self.theta, self.sections, self.embed_tokens.weight.dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: KVCache | None = None):
        """x (B, T, E) embeddings -> (B, T, E) after the final norm; a cache is filled in passing, by T tokens.

        mask None: causal, or one new token that sees the whole cache.
        """
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, i, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)
