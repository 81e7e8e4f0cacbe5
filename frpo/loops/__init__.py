"""The two training loops and the sources of their batches.

    rl                      reinforcement learning: sample, score, weigh, update, push
    sft                     supervised fine-tuning: SFT, CSFT, CSFT+PA
    batches, ahead, replay  the next scored batch: sampled now, sampled while the learner works, or read from traces
    collect, update         the two halves of a step
"""
