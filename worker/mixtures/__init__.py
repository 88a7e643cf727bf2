"""Mixtures of LoRA experts on one frozen model: ROCKET's (arXiv 2408.15915), MoLA's and MoR's (arXiv 2503.23362).

In each adapted linear layer with frozen weight W, for a token x (d,) and N experts A_n (r, d), B_n (o, r):

    z = router(x) (N,);  S = the k largest of z;  w = softmax over S, in float32
    y = W x + Σ_{n ∈ S} w_n · (α_n / r) · B_n A_n dropout(x)

which is what softmax over all, choosing k and normalising again gives. Layers have N, k and r of their own.

* `routers.py`: what z is made of. `layer.py`: the layer, as a LoRA of PEFT's. `balance.py`: what routers did in a pass,
  and the load-balance loss of it. `model.py`: making a mixture on a base model, fresh or of adapters that exist.
  `folders.py`: saving and loading.
* Without a gate over the whole batch (`gate_scope=batch`) a token's output depends on what stands before it alone.
* A mixture cannot be merged into its base model, or turned into one LoRA: what a token gets depends on the token.
"""

from __future__ import annotations
