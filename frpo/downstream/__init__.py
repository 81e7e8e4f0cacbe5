"""Run the retention matrix: make policies, fine-tune forks of each, measure what the forks keep, report the results.

    plan      turns a recipe into stages, each a run in a folder of its own, and reads their states
    measures  lists the measures by which a policy may be chosen
    checks    checks models, data and rewards before anything starts
    stages    runs stages on one set of running processes
    before    stores the measurements of a policy before any fork as files
    reading   reads the files of finished stages into one record, the results
    caveats   lists warnings that a reader needs before the results
    choice    reports which policy is best, and whether its lead is more than chance
    tables, pictures, report   show results in words and drawings, and write the page
"""
