rule prepare_data:
    input:
        script="workflow/scripts/prepare_data.py",
    output:
        "resources/data/{dataset}/manifest.json",
    log:
        "logs/prepare_data/{dataset}.log",
    benchmark:
        "results/benchmarks/prepare_data/{dataset}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        identity=data_settings,
        source=data_source,
    shell:
        "python {input.script} --source {params.source:q} --name {wildcards.dataset} --output {output} > {log} 2>&1"


rule tokenize:
    """One model's tokens, or those of student and teacher, who must read the same bytes."""
    input:
        script="workflow/scripts/tokenize_data.py",
        records="resources/data/{dataset}/manifest.json",
        models=reader_models_of,
    output:
        "results/tokens/{readers}/{dataset}/manifest.json",
    log:
        "logs/tokenize/{readers}/{dataset}.log",
    benchmark:
        "results/benchmarks/tokenize/{readers}/{dataset}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=60,
    params:
        text=text_settings,
        one_tokenizer=one_tokenizer,
    shell:
        "python {input.script} --records {input.records} --models {input.models} --text {params.text:q}"
        " {params.one_tokenizer} --output {output} > {log} 2>&1"


rule align:
    input:
        script="workflow/scripts/align.py",
        tokens="results/tokens/{readers}/{dataset}/manifest.json",
    output:
        "results/alignments/{readers}/{dataset}/manifest.json",
    log:
        "logs/align/{readers}/{dataset}.log",
    benchmark:
        "results/benchmarks/align/{readers}/{dataset}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=30,
    shell:
        "python {input.script} --tokens {input.tokens} --output {output} > {log} 2>&1 && tail -n 1 {log}"


rule spell:
    """Edit distances of the tokens that student and teacher read at response positions, and the warping path through them."""
    input:
        script="workflow/scripts/spell.py",
        tokens="results/tokens/{readers}/{dataset}/manifest.json",
        models=reader_models_of,
    output:
        "results/spellings/{readers}/{dataset}/manifest.json",
    log:
        "logs/spell/{readers}/{dataset}.log",
    benchmark:
        "results/benchmarks/spell/{readers}/{dataset}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=60,
    shell:
        "python {input.script} --tokens {input.tokens} --models {input.models} --output {output} > {log} 2>&1"
        " && tail -n 1 {log}"


rule map_vocabulary:
    """What the tokens of a teacher are in the vocabulary of a student."""
    input:
        script="workflow/scripts/map_vocabulary.py",
        models=reader_models_of,
    output:
        "results/vocabularies/{readers}/manifest.json",
    log:
        "logs/map_vocabulary/{readers}.log",
    benchmark:
        "results/benchmarks/map_vocabulary/{readers}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "python {input.script} --models {input.models} --output {output} > {log} 2>&1 && tail -n 1 {log}"
