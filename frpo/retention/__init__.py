"""The retention matrix: make policies, fine-tune forks of each, measure what they keep, tell it.

    plan      a recipe becomes stages, each a run in a folder of its own, and their states
    stages    runs stages on one set of running processes
    before    what is measured of a policy before any fork, as files
    reading   the files of finished stages become results, one record
    caveats   what a reader has to know before these
    tables, pictures, report   results in words and drawings, and the page
"""
