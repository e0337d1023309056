"""The gateway: remaps `/embed` and `/rerank` JSON onto Triton's v2 infer and does no model work itself."""
