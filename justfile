# Wrappers of plain cargo commands; nothing needs `just`.

# The newcomer's command.
quickstart:
    cargo run --release -- run scenarios/quickstart.yaml

test:
    cargo test --workspace

# Everything CI runs.
ci:
    .ci/run

bench:
    cargo bench -p benches

# Look at changed snapshots.
review:
    cargo insta review

# The schema of scenario files, as published.
schema:
    cargo run --release -- schema > docs/scenario.schema.json
