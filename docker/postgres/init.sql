-- Run once by the postgres image, on an empty volume. Two databases, each with a role that owns it and nothing else.
-- The passwords come from the environment, so that no command line and no file holds them.
\getenv study_password STUDY_DB_PASSWORD
\getenv mlflow_password MLFLOW_DB_PASSWORD

CREATE ROLE study LOGIN PASSWORD :'study_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE study OWNER study;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT, TEMPORARY ON DATABASE study, mlflow FROM PUBLIC;
