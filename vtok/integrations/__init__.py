"""What serving engines and model libraries call."""

from __future__ import annotations

from vtok.integrations.evs import retained_tokens_count, retention_mask

__all__ = ["retained_tokens_count", "retention_mask"]
