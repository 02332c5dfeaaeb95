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
        "python {input.script} --tokens {input.tokens} --output {output} > {log} 2>&1"
