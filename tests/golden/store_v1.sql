BEGIN TRANSACTION;
CREATE TABLE assignments (
	hash VARCHAR(64) NOT NULL, 
	body BLOB NOT NULL, 
	CONSTRAINT pk_assignments PRIMARY KEY (hash)
);
INSERT INTO "assignments" VALUES('f1c938fd21118ae5c1e802c0f4cc9282e389b3349693fc9b036959112af5db3e',X'78DAAB564AC92FCF53B252CA4E4D2D50D2512A2D00B28B4AF27433F34A2C74933312F3F25273748B2B7375132D522AF3946A0191C9108C');
INSERT INTO "assignments" VALUES('be20612238f1b4988d81001986fb1ffbbb4ae0de3e9119cdae7a048aeef79488',X'78DAAB564AC92FCF53B252CA4E4D2D50D2512A2D00B2330A0B7533F34A8C75D3CD4C748BAA946A01EAF20BF7');
INSERT INTO "assignments" VALUES('3023eca3e06cbe318c727999b6e3ea4bd07b6aed73b3fb679df71941e4fc82ec',X'78DAAB564AC92FCF53B252CA4E4D2D50D2512A2D00B1735313F38A4D74933312F3F25273946A01EFE80CA4');
INSERT INTO "assignments" VALUES('8f468efc39b10fce55930dddad53caf6249a1f4634c53d105d9fd8162d8b9653',X'78DAAB564AC92FCF53B252CA4E4D2D50D2512A2D80B16B0178F30890');
INSERT INTO "assignments" VALUES('b049e22542709b775b4268d002005b14482352dcbb567ba6d964e83d02a77d95',X'78DAAB564AC92FCF53B252CA4E4D2D50D2512A2D00B28B4AF27433F34A4C74D3CD4C946A01C8B40AE9');
CREATE TABLE autoq_schema (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT autoq_schema_pkc PRIMARY KEY (version_num)
);
INSERT INTO "autoq_schema" VALUES('0001');
CREATE TABLE frontier (
	study_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	point TEXT NOT NULL, 
	CONSTRAINT pk_frontier PRIMARY KEY (study_id, trial_id), 
	CONSTRAINT fk_frontier_study_id FOREIGN KEY(study_id) REFERENCES studies (id) ON DELETE CASCADE, 
	CONSTRAINT fk_frontier_trial_id FOREIGN KEY(trial_id) REFERENCES trials (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "frontier" VALUES(1,1,'[0.125,2048.0]');
INSERT INTO "frontier" VALUES(1,2,'[0.5,1024.0]');
CREATE TABLE measurements (
	trial_id INTEGER NOT NULL, 
	objective VARCHAR(128) NOT NULL, 
	part VARCHAR(16) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	value DOUBLE NOT NULL, 
	stderr DOUBLE, 
	unit VARCHAR(64) NOT NULL, 
	n BIGINT NOT NULL, 
	device TEXT NOT NULL, 
	detail TEXT NOT NULL, 
	CONSTRAINT pk_measurements PRIMARY KEY (trial_id, objective, part), 
	CONSTRAINT fk_measurements_trial_id FOREIGN KEY(trial_id) REFERENCES trials (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "measurements" VALUES(1,'kl_nats_per_token','search','measured',0.125,0.01,'nats/token',2048,'cpu','{"threads":2}');
INSERT INTO "measurements" VALUES(1,'size_bytes','search','computed',2048.0,NULL,'bytes',1,'','{}');
INSERT INTO "measurements" VALUES(2,'kl_nats_per_token','report','measured',0.625,0.01,'nats/token',2048,'cpu','{"threads":2}');
INSERT INTO "measurements" VALUES(2,'kl_nats_per_token','search','measured',0.5,0.01,'nats/token',2048,'cpu','{"threads":2}');
INSERT INTO "measurements" VALUES(2,'size_bytes','search','computed',1024.0,NULL,'bytes',1,'','{}');
INSERT INTO "measurements" VALUES(5,'kl_nats_per_token','search','measured',0.0,0.01,'nats/token',2048,'cpu','{"threads":2}');
INSERT INTO "measurements" VALUES(5,'size_bytes','search','computed',4096.0,NULL,'bytes',1,'','{}');
CREATE TABLE studies (
	id INTEGER NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	spec TEXT NOT NULL, 
	objectives TEXT NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	message TEXT, 
	changes INTEGER NOT NULL, 
	created_at DATETIME NOT NULL, 
	started_at DATETIME, 
	finished_at DATETIME, 
	sampler_attrs TEXT NOT NULL, 
	"plan" TEXT, 
	CONSTRAINT pk_studies PRIMARY KEY (id), 
	CONSTRAINT uq_studies_name UNIQUE (name)
);
INSERT INTO "studies" VALUES(1,'golden','{"model":{"id":"demo:tiny","dtype":"bfloat16","revision":null},"name":"golden","data":{"source":"python-docs","config":null,"split":"train","column":"text","calibration_tokens":4096,"search_tokens":2048,"report_tokens":16384,"window_tokens":512,"seed":0},"target":{"name":"torch-cpu","batch_size":1,"prompt_tokens":512,"threads":null},"space":{"schemes":null,"methods":null,"bits":null,"group_size":null,"zero_points":null,"activations":null,"kinds":["linear"],"exclude":[],"overrides":[]},"objectives":["kl_nats_per_token","size_bytes"],"constraints":{"size_bytes":{"min":null,"max":3000.0}},"sampler":{"name":"nsga2","seed":0,"seeds":null,"options":{}},"budget":{"trials":96,"wall_time":null,"trial_time":null,"report_points":null},"workers":{"executor":"local","count":1,"cpus":null,"gpus":0.0,"address":null},"bank":{"disk":20000000000,"memory":null}}','[["kl_nats_per_token","nats/token","minimize"],["size_bytes","bytes","minimize"]]','interrupted','Ctrl-C',17,'2026-11-21 23:29:49.572111','2026-11-21 23:29:49.581817','2026-11-21 23:29:49.676095','{"seen":[0]}','{"seeds":1}');
CREATE TABLE tables (
	study_id INTEGER NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	body TEXT NOT NULL, 
	CONSTRAINT pk_tables PRIMARY KEY (study_id, name), 
	CONSTRAINT fk_tables_study_id FOREIGN KEY(study_id) REFERENCES studies (id) ON DELETE CASCADE
);
INSERT INTO "tables" VALUES(1,'sensitivity','{"up":{"rtn-int4-g64":0.25}}');
CREATE TABLE trials (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	origin VARCHAR(16) NOT NULL, 
	baseline TEXT, 
	assignment VARCHAR(64) NOT NULL, 
	duplicate_of INTEGER, 
	attempt INTEGER NOT NULL, 
	changed INTEGER NOT NULL, 
	feasible BOOLEAN, 
	violations TEXT, 
	sampler_attrs TEXT NOT NULL, 
	error_type TEXT, 
	error_message TEXT, 
	traceback TEXT, 
	worker TEXT, 
	seconds DOUBLE, 
	created_at DATETIME NOT NULL, 
	finished_at DATETIME, 
	CONSTRAINT pk_trials PRIMARY KEY (id), 
	CONSTRAINT fk_trials_study_id FOREIGN KEY(study_id) REFERENCES studies (id) ON DELETE CASCADE, 
	CONSTRAINT fk_trials_assignment FOREIGN KEY(assignment) REFERENCES assignments (hash), 
	CONSTRAINT uq_trials_study_id_number UNIQUE (study_id, number)
);
INSERT INTO "trials" VALUES(1,1,0,'complete','baseline','uniform-8','f1c938fd21118ae5c1e802c0f4cc9282e389b3349693fc9b036959112af5db3e',NULL,1,6,1,'{"size_bytes":-952.0}','{"generation":0}',NULL,NULL,NULL,'local',1.5,'2026-11-21 23:29:49.591833','2026-11-21 23:29:49.606015');
INSERT INTO "trials" VALUES(2,1,1,'complete','seed',NULL,'be20612238f1b4988d81001986fb1ffbbb4ae0de3e9119cdae7a048aeef79488',NULL,1,9,1,'{"size_bytes":-1976.0}','{}',NULL,NULL,NULL,'local',1.25,'2026-11-21 23:29:49.619475','2026-11-21 23:29:49.630804');
INSERT INTO "trials" VALUES(3,1,2,'failed','sampler',NULL,'3023eca3e06cbe318c727999b6e3ea4bd07b6aed73b3fb679df71941e4fc82ec',NULL,2,12,NULL,NULL,'{}','ValueError','no','Traceback …
ValueError: no','w1',0.5,'2026-11-21 23:29:49.641091','2026-11-21 23:29:49.648135');
INSERT INTO "trials" VALUES(4,1,3,'duplicate','sampler',NULL,'be20612238f1b4988d81001986fb1ffbbb4ae0de3e9119cdae7a048aeef79488',1,1,13,NULL,NULL,'{}',NULL,NULL,NULL,NULL,NULL,'2026-11-21 23:29:49.652030','2026-11-21 23:29:49.652030');
INSERT INTO "trials" VALUES(5,1,4,'complete','sampler',NULL,'8f468efc39b10fce55930dddad53caf6249a1f4634c53d105d9fd8162d8b9653',NULL,1,15,0,'{"size_bytes":1096.0}','{}',NULL,NULL,NULL,'local',1.0,'2026-11-21 23:29:49.658030','2026-11-21 23:29:49.663423');
INSERT INTO "trials" VALUES(6,1,5,'running','sampler',NULL,'b049e22542709b775b4268d002005b14482352dcbb567ba6d964e83d02a77d95',NULL,1,16,NULL,NULL,'{}',NULL,NULL,NULL,NULL,NULL,'2026-11-21 23:29:49.668927',NULL);
CREATE INDEX ix_trials_study_id_assignment ON trials (study_id, assignment);
CREATE INDEX ix_trials_study_id_state ON trials (study_id, state);
CREATE INDEX ix_trials_study_id_changed ON trials (study_id, changed);
COMMIT;
