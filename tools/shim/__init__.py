"""The gateway: remaps the JSON of several dialects onto Triton's v2 infer and does no model work itself."""
