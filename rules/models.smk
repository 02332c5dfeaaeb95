rule download_model:
    input:
        script="workflow/scripts/download_model.py",
        text=tokenizer_text_of,
    output:
        "resources/models/{model}/manifest.json",
    log:
        "logs/download_model/{model}.log",
    benchmark:
        "results/benchmarks/download_model/{model}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        download=1,
        mem_mb=memory,
        disk_mb=disk,
        runtime=120,
    params:
        identity=model_identity,
        source=model_source,
        text=lambda wildcards, input: f"--text {input.text}" if input.text else "",
    shell:
        "python {input.script} --source {params.source:q} {params.text} --output {output} > {log} 2>&1"
