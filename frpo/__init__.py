"""Post-training whose result survives the next fine-tuning: FRPO on Ray, vLLM and DeepSpeed ZeRO."""
