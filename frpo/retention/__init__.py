"""The retention matrix: make policies, fine-tune forks of each, measure what they keep, tell it.

    plan      a recipe becomes stages, each a run in a folder of its own, and their states
    stages    runs stages on one set of running processes
    before    what is measured of a policy before any fork, as files
    results   the rows of finished stages become numbers, tables and pictures
    caveats   what a reader has to know before these
"""
