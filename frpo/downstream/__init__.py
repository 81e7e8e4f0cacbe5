"""The retention matrix: make policies, fine-tune forks of each, measure what they keep, tell it.

    plan      a recipe becomes stages, each a run in a folder of its own, and their states
    measures  what a policy may be chosen by
    checks    what is looked at before anything starts
    stages    runs stages on one set of running processes
    before    what is measured of a policy before any fork, as files
    reading   the files of finished stages become results, one record
    caveats   what a reader has to know before these
    choice    which policy is best, and whether it is
    tables, pictures, report   results in words and drawings, and the page
"""
