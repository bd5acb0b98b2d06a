"""The PEFT tuner: bypasses are injected, observed, replaced by factors, trained on, and exported."""
