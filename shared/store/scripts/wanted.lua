-- Look whether a worker's want is as it was written. A key of another type counts as lost.
-- KEYS[1] want
-- Returns the version that stands there ('' for none) and the number of fields.
local version = redis.pcall('HGET', KEYS[1], 'version')
if type(version) == 'table' then return {'', 0} end
return {version or '', redis.call('HLEN', KEYS[1])}
