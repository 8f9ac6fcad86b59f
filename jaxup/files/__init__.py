"""The bytes of a model directory: headers, shards, staging, manifests, and where they lie. No plan is known here."""
