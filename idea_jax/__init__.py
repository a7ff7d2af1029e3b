"""ID-EA in JAX: learn one person from a photo, draw them with Stable Diffusion."""

import os

__version__ = "0.2.0"

# onnxruntime (from 1.29 on) reports its use to its maker, and the Hub's client says more of this
# machine than it has to, unless these are set before they are imported: hence here, where every way
# to them begins. Whoever has set one has decided; docs/privacy.md says what each does.
for _switch in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_switch] = os.environ.get(_switch) or "1"
