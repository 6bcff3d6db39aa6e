-- Prompts with holes, by owner, name and version. A version never changes, but for being taken out of use.
CREATE TABLE templates (
    account_id  text NOT NULL, -- '' where it is everyone's
    name        text COLLATE "C" NOT NULL CHECK (name ~ '^(shared/)?[a-z][a-z0-9-]{0,62}$'),
    version     integer NOT NULL CHECK (version > 0),
    definition  bytea NOT NULL, -- framewire.gateway.v1.Template, of which description, spec and variables count
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    archived_at timestamptz,
    PRIMARY KEY (account_id, name, version),
    CHECK ((account_id = '') = (name LIKE 'shared/%'))
);

CREATE FUNCTION template_stays() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.account_id, NEW.name, NEW.version, NEW.definition, NEW.created_at)
       IS DISTINCT FROM (OLD.account_id, OLD.name, OLD.version, OLD.definition, OLD.created_at)
       OR OLD.archived_at IS DISTINCT FROM NEW.archived_at AND OLD.archived_at IS NOT NULL THEN
        RAISE EXCEPTION 'a version of a template never changes';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER templates_stay BEFORE UPDATE ON templates FOR EACH ROW EXECUTE FUNCTION template_stays();

-- What a video was made from. Its filled prompt stands in the spec.
ALTER TABLE videos
    ADD COLUMN template_name    text NOT NULL DEFAULT '', -- '': none
    ADD COLUMN template_version integer NOT NULL DEFAULT 0 CHECK (template_version >= 0);
CREATE INDEX videos_by_template ON videos (account_id, template_name, created_at) WHERE template_name <> '';
