use super::*;

/// An experiment's folder in a results folder.
struct Folder(tempfile::TempDir);

impl Folder {
    fn path(&self) -> PathBuf {
        self.0.path().join("e")
    }
}

fn folder() -> Folder {
    let folder = Folder(tempfile::tempdir().unwrap());
    fs::create_dir(folder.path()).unwrap();
    folder
}

fn row(score: &str) -> Row {
    record(&[("score", score), ("seconds", "1")])
}

fn record(cells: &[(&str, &str)]) -> Row {
    cells.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect()
}

/// Keys with models: `a`, or `b:other`.
fn plan(keys: &[&str]) -> Vec<(String, Row)> {
    let cell = |k: &&str| {
        let (key, model) = k.split_once(':').unwrap_or((k, "m"));
        (key.to_string(), record(&[("model", model), ("variant", key)]))
    };
    keys.iter().map(cell).collect()
}

fn by(clone: &str) -> Provenance {
    Provenance { made: Made { clone: clone.into(), ..Made::default() }, ..Provenance::default() }
}

/// Begins, and gives what keeps the work going.
fn begin(store: &mut Store, fresh: bool, provenance: Provenance) -> Result<()> {
    let folder = store.dir.parent().unwrap().to_path_buf();
    let worker = Worker::of(&folder, "")?;
    store.begin(fresh, provenance, &worker)
}

fn open(dir: &Path, plan: &[(String, Row)]) -> Store {
    let mut store = Store::open(dir, plan, &["score", "seconds"]).unwrap();
    begin(&mut store, false, by("here")).unwrap();
    store
}

/// Records cells, and merges them at once.
fn finish(store: &mut Store, cells: impl IntoIterator<Item = (String, Vec<Row>)>) {
    store.finish(cells).unwrap();
    store.settle().unwrap();
}

fn done(key: &str, score: &str) -> [(String, Vec<Row>); 1] {
    [(key.to_string(), vec![row(score)])]
}

fn text(dir: &Path) -> String {
    fs::read_to_string(dir.join(CELLS)).unwrap()
}

#[test]
fn rows_are_in_plan_order_however_they_finish() {
    let dir = folder();
    let mut store = open(&dir.path(), &plan(&["a", "b", "c"]));
    finish(&mut store, done("c", "3"));
    finish(&mut store, [("a".to_string(), vec![row("1"), row("1.5")])]);
    assert_eq!(text(&dir.path()), "key,model,variant,score,seconds\na,m,a,1,1\na,m,a,1.5,1\nc,m,c,3,1\n");
    let again = open(&dir.path(), &plan(&["a", "b", "c"]));
    assert!(again.is_done("a") && again.is_done("c") && !again.is_done("b"));
    assert_eq!(again.rows("a").unwrap().len(), 2);
    assert_eq!(again.made("a").unwrap().clone, "here");
}

#[test]
fn rows_of_other_plans_stand_beside_the_plan_s() {
    let dir = folder();
    finish(&mut open(&dir.path(), &plan(&["a", "b"])), done("a", "1"));
    let swept =
        [("c".to_string(), record(&[("model", "n"), ("variant", "c"), ("cache.t", "0.5"), ("cache", "{}")]))];
    let mut other = Store::open(&dir.path(), &swept, &["kl"]).unwrap();
    begin(&mut other, false, by("here")).unwrap();
    assert!(!other.is_done("a"));
    finish(&mut other, [("c".to_string(), vec![record(&[("kl", "0.1")])])]);
    let both = "key,model,variant,cache.t,cache,kl,score,seconds\nc,n,c,0.5,{},0.1,,\na,m,a,,,,1,1\n";
    assert_eq!(text(&dir.path()), both);
    assert_eq!(other.others("model").collect::<Vec<_>>(), ["m"]);
    let back = open(&dir.path(), &plan(&["a", "b"]));
    assert!(back.is_done("a"));
    assert_eq!(
        text(&dir.path()),
        "key,model,variant,cache.t,cache,score,seconds,kl\na,m,a,,,1,1,\nc,n,c,0.5,{},,,0.1\n"
    );
    assert!(!dir.path().join(ASIDE).exists());
}

#[test]
fn a_row_of_the_same_names_gives_way_once_the_new_one_is_finished_and_comes_back() {
    let dir = folder();
    let named = |key: &str| [(key.to_string(), record(&[("model", "m"), ("variant", "v")]))];
    finish(&mut open(&dir.path(), &named("whole")), done("whole", "1"));
    let whole = text(&dir.path());
    let mut store = open(&dir.path(), &named("limited"));
    assert!(text(&dir.path()).contains("whole,m,v,1,1\n"), "until the new one is finished");
    finish(&mut store, done("limited", "2"));
    assert!(!text(&dir.path()).contains("whole") && text(&dir.path()).contains("limited"));
    assert!(fs::read_to_string(dir.path().join(ASIDE)).unwrap().contains("\"key\":\"whole\""));
    let back = open(&dir.path(), &named("whole"));
    assert!(back.is_done("whole") && back.made("limited").is_some());
    assert_eq!(text(&dir.path()), whole);
    let aside = fs::read_to_string(dir.path().join(ASIDE)).unwrap();
    assert!(aside.contains("limited") && !aside.contains("whole"));
}

#[test]
fn a_kill_between_two_files_loses_no_row() {
    let dir = folder();
    let named = |key: &str| [(key.to_string(), record(&[("model", "m"), ("variant", "v")]))];
    finish(&mut open(&dir.path(), &named("one")), done("one", "1"));
    let before = text(&dir.path());
    finish(&mut open(&dir.path(), &named("two")), done("two", "2"));
    // Set aside already, and cells.csv still the old one.
    fs::write(dir.path().join(CELLS), before).unwrap();
    let mut store = open(&dir.path(), &named("two"));
    assert!(!store.is_done("two"));
    finish(&mut store, done("two", "2"));
    assert!(open(&dir.path(), &named("one")).is_done("one"));
    assert!(open(&dir.path(), &named("two")).is_done("two"));
}

#[test]
fn names_follow_the_plan() {
    let dir = folder();
    finish(&mut open(&dir.path(), &plan(&["a"])), done("a", "1"));
    let renamed = vec![("a".to_string(), record(&[("model", "m"), ("variant", "ours")]))];
    let mut store = Store::open(&dir.path(), &renamed, &["score"]).unwrap();
    begin(&mut store, false, by("here")).unwrap();
    assert_eq!(text(&dir.path()), "key,model,variant,score\na,m,ours,1\n");
}

#[test]
fn a_torn_line_costs_its_cell_and_no_other() {
    let dir = folder();
    let both = plan(&["a", "b"]);
    let mut store = open(&dir.path(), &both);
    finish(&mut store, [("a".to_string(), vec![row("1")]), ("b".to_string(), vec![row("2"), row("3")])]);
    let whole = text(&dir.path());
    for cut in 1..4 {
        fs::write(store.cells_path(), &whole[..whole.len() - cut]).unwrap();
        let torn = open(&dir.path(), &both);
        assert!(torn.is_done("a") && !torn.is_done("b"), "cut {cut}");
    }
    for (file, bytes, words) in [
        (CELLS, "x,y\n1,2\n", "no column `key`"),
        (ASIDE, "{\"key\":\"a\",\"rows\":[]}\n{\"key\"\n", "line 2"),
        (MADE, "[", "made.json"),
    ] {
        fs::write(dir.path().join(file), bytes).unwrap();
        let e = Store::open(&dir.path(), &both, &["score"]).unwrap_err().to_string();
        assert!(e.contains(words) && e.contains(file) && e.contains("remove the"), "{e}");
        fs::remove_file(dir.path().join(file)).unwrap();
    }
}

#[test]
fn fresh_forgets_the_planned_cells_only_and_shows_their_rows_until_they_are_there_again() {
    let dir = folder();
    let mut store = open(&dir.path(), &plan(&["a", "b"]));
    finish(&mut store, [("a".to_string(), vec![row("1")]), ("b".to_string(), vec![row("2")])]);
    let of = || vec![crate::store::digest(&"x")];
    store.samples::<Row>("b", of()).unwrap().put([(0, row("2"))]).unwrap();
    let mut store = Store::open(&dir.path(), &plan(&["b"]), &["score", "seconds"]).unwrap();
    assert!(store.is_done("b"));
    begin(&mut store, true, by("here")).unwrap();
    assert!(!store.is_done("b") && !store.samples_path("b").exists());
    assert!(text(&dir.path()).contains("b,m,b,2,1"));
    // Stopped here, it goes on without being told again.
    let mut store = open(&dir.path(), &plan(&["b"]));
    assert!(!store.is_done("b") && open(&dir.path(), &plan(&["a"])).is_done("a"));
    finish(&mut store, done("b", "3"));
    let store = open(&dir.path(), &plan(&["b"]));
    assert!(store.is_done("b") && text(&dir.path()).contains("b,m,b,3,1"));
}

#[test]
fn cells_of_another_checkout_are_computed_again_where_that_is_asked() {
    let dir = folder();
    let cells = plan(&["a", "b"]);
    let mut store = Store::open(&dir.path(), &cells, &["score", "seconds"]).unwrap();
    begin(&mut store, false, by("there")).unwrap();
    finish(&mut store, [("a".to_string(), vec![row("1")]), ("b".to_string(), vec![row("2")])]);
    let reusing = |reuse| {
        let store = Store::open(&dir.path(), &cells, &["score", "seconds"]).unwrap();
        store.reusing(reuse, Some("here"))
    };
    assert!(reusing(Reuse::Any).is_done("a"));
    let mut own = reusing(Reuse::Own);
    assert!(!own.is_done("a"));
    begin(&mut own, false, by("here")).unwrap();
    finish(&mut own, done("a", "1.5"));
    assert!(text(&dir.path()).contains("a,m,a,1.5,1\nb,m,b,2,1\n"));
    let own = reusing(Reuse::Own);
    assert!(own.is_done("a") && !own.is_done("b"));
    assert_eq!(
        (own.made("a").unwrap().clone.as_str(), own.made("b").unwrap().clone.as_str()),
        ("here", "there")
    );
    let none = Store::open(&dir.path(), &cells, &["score"]).unwrap().reusing(Reuse::Own, None);
    assert!(!none.is_done("a"));
}

#[test]
fn a_cell_with_a_damaged_sample_file_is_not_finished() {
    let dir = folder();
    let open = || {
        let mut store = Store::open(&dir.path(), &plan(&["a"]), &["score", "samples"]).unwrap();
        begin(&mut store, false, by("here")).unwrap();
        store
    };
    let mut store = open();
    let of = || vec![crate::store::digest(&"x"), crate::store::digest(&"y")];
    let mut samples = store.samples::<Row>("a", of()).unwrap();
    samples.put([(0, row("1")), (1, row("2"))]).unwrap();
    let finished = [("a".to_string(), vec![record(&[("score", "1"), ("samples", "2")])])];
    finish(&mut store, finished);
    let path = store.samples_path("a");
    let whole = fs::read_to_string(&path).unwrap();
    assert!(open().is_done("a"));
    for damaged in [whole.replace('1', "7"), whole.lines().next().unwrap().to_string() + "\n"] {
        fs::write(&path, damaged).unwrap();
        assert!(!open().is_done("a"));
    }
    fs::remove_file(&path).unwrap();
    assert!(open().is_done("a"), "results come without samples");
}

#[test]
fn samples_of_the_same_cell_beside_are_taken_unless_it_is_computed_anew() {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Sample {
        kl: f64,
    }
    let sample = |at| (at, Sample { kl: at as f64 });
    let dir = folder();
    let of = || ["x", "y"].map(|text| crate::store::digest(&text)).to_vec();
    let store = open(&dir.path(), &plan(&["a", "b"]));
    store.samples::<Sample>("a", of()).unwrap().put([1, 0].map(sample)).unwrap();
    store.samples::<Sample>("b", of()).unwrap().put([sample(1)]).unwrap();
    let beside = dir.path().with_file_name("f");
    let there = |fresh, key: &str| {
        let mut store = Store::open(&beside, &plan(&["a", "b"]), &["score"]).unwrap();
        begin(&mut store, fresh, by("here")).unwrap();
        store.samples::<Sample>(key, of()).unwrap()
    };
    assert!(!there(true, "a").has(0));
    let mut part = there(false, "b");
    assert!(part.has(1) && !part.has(0));
    part.put([sample(0)]).unwrap();
    part.settle().unwrap();
    there(false, "a").settle().unwrap();
    for key in ["a", "b"] {
        let own = samples_path(&beside, key);
        assert!(samples::are_sound(&own, key, 2).unwrap(), "{key}");
    }
    // Of other texts they are other samples.
    let other = Store::open(&beside.with_file_name("g"), &plan(&["a"]), &["score"]).unwrap();
    assert!(!other.samples::<Sample>("a", vec![crate::store::digest(&"z")]).unwrap().has(0));
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let dir = folder();
    let file = dir.path().join("f");
    fs::write(&file, "x").unwrap();
    let e = Store::open(&file, &plan(&["a"]), &["score"]).and_then(|mut s| begin(&mut s, false, by("")));
    let e = e.unwrap_err().to_string();
    assert!(e.contains("f") && e.lines().count() == 1, "{e}");
}
