//! A cache saved and loaded goes on as the one that was saved; damaged files are refused.

use minicache_core::archive::{load, save};
use minicache_core::{CacheSpec, KvCache, Resources, build};
use rand::{SeedableRng, rngs::StdRng};

use crate::numbers::all;
use crate::{random_states, shape, step};

fn saved(cache: &dyn KvCache) -> Vec<u8> {
    let mut file = Vec::new();
    save(cache, "this test", &[], &mut file).unwrap();
    file
}

/// `fill` gives an empty cache.
fn check(what: &str, window: Option<usize>, empty: &dyn Fn() -> Box<dyn KvCache>) {
    let mut rng = StdRng::seed_from_u64(5);
    for lengths in [&[][..], &[1], &[40], &[150, 1, 1, 7, 1]] {
        let mut cache = empty();
        let shape = *cache.shape();
        for &tokens in lengths {
            let states: Vec<_> = (0..shape.layers).map(|_| random_states(&mut rng, &shape, tokens)).collect();
            step(&mut *cache, &states);
        }
        let file = saved(&*cache);
        let mut loaded = empty();
        load(&mut *loaded, "this test", &mut &file[..]).unwrap();
        assert_eq!(loaded.len(), cache.len());
        assert_eq!(saved(&*loaded), file, "{what}, {window:?}");
        for layer in 0..shape.layers {
            assert_eq!(loaded.restored(layer).unwrap(), cache.restored(layer).unwrap(), "{what}");
        }
        for tokens in [1, 1, 30] {
            let states: Vec<_> = (0..shape.layers).map(|_| random_states(&mut rng, &shape, tokens)).collect();
            assert_eq!(step(&mut *loaded, &states), step(&mut *cache, &states), "{what}, {window:?}");
        }
        let held = [&loaded, &cache].map(|c| c.footprint().total() as f64);
        assert!(held[0] <= 1.05 * held[1] + 4096.0, "{what}: {held:?}");
    }
}

#[test]
fn a_loaded_cache_goes_on_as_the_saved_one() {
    for window in [None, Some(40)] {
        let shape = shape(2, 2, 32, window);
        for (spec, resources) in all(&shape) {
            check(&spec.label(), window, &|| build(&spec, &shape, &resources).unwrap());
        }
    }
}

#[test]
fn files_of_something_else_or_damaged_are_refused() {
    let shape = shape(2, 2, 32, None);
    let empty = |text: &str| build(&CacheSpec::parse(text).unwrap(), &shape, &Resources::default()).unwrap();
    let mut rng = StdRng::seed_from_u64(6);
    for text in [
        "full",
        "{ method = \"minicache\", start_layer = 1, quant = { bits = 4 } }",
        "kivi-2",
        "{ method = \"h2o\", heavy = 5, recent = 9 }",
    ] {
        let mut cache = empty(text);
        let states: Vec<_> = (0..shape.layers).map(|_| random_states(&mut rng, &shape, 70)).collect();
        step(&mut *cache, &states);
        let file = saved(&*cache);
        let refused = |file: &[u8]| {
            let mut cache = empty(text);
            load(&mut *cache, "this test", &mut &file[..]).unwrap_err().to_string()
        };
        let e = load(&mut *empty(text), "another", &mut &file[..]).unwrap_err().to_string();
        assert!(e.contains("this test, not another"), "{e}");
        assert!(refused(b"").contains("ends too early"));
        assert!(refused(b"something else").contains("is no saved cache"));
        assert!(refused(&file[..file.len() / 2]).contains("ends too early"));
        // One bit of every part of the file.
        for at in (8..file.len()).step_by(file.len() / 200) {
            let mut bad = file.clone();
            bad[at] ^= 1 << (at % 8);
            let e = refused(&bad);
            assert!(e.starts_with("the saved cache ") && !e.contains('\n'), "{e}");
        }
        assert!(load(&mut *cache, "this test", &mut &file[..]).is_err());
    }
}
