//! The experiments that come with the program.

use std::fs;

#[test]
fn every_experiment_has_both_profiles_with_models_that_have_names() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../experiments");
    let registry = minicache_models::Registry::built_in().unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "toml") {
            continue;
        }
        let load = |profile| minicache_config::Experiment::load(&path, &[], Some(profile)).unwrap();
        let (default, paper) = (load("default"), load("paper"));
        assert!(["default", "paper"].iter().all(|p| default.profiles.contains_key(*p)), "{}", path.display());
        for model in default.models.iter().chain(&paper.models) {
            assert!(registry.find(model).is_some(), "{}: {model}", path.display());
        }
        assert_ne!(default.models, paper.models, "{}", path.display());
        assert_eq!(Some(default.id.as_str()), path.file_stem().and_then(|s| s.to_str()));
        for paper in &default.paper {
            assert!(path.with_file_name("paper").join(&paper.csv).is_file(), "{}", paper.csv);
        }
        seen += 1;
    }
    assert!(seen >= 8, "{seen}");
}
